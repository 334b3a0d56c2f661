"""The networks of the study, beside their configs."""

import math

import torch
from torch import Tensor, nn


class Hidden(nn.Module):
    """One hidden layer, for rows of a table."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 16) -> None:
        super().__init__()
        self.hidden = nn.Linear(math.prod(input_shape), width)
        self.output = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits or predicted numbers, `[batch, classes]`."""
        return self.output(torch.tanh(self.hidden(inputs)))


class Transformer(nn.Module):
    """One block of attention over the tokens so far, without dropout."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(classes, width)
        self.place = nn.Embedding(input_shape[0], width)
        self.before_attention, self.before_steps, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.mixed = nn.Linear(width, 3 * width, bias=False)
        self.joined = nn.Linear(width, width, bias=False)
        self.steps = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.output = nn.Linear(width, classes)
        self.register_buffer("future", torch.ones(input_shape[0], input_shape[0], dtype=torch.bool).triu(1))
        self.register_buffer("places", torch.arange(input_shape[0]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the next token after each position, `[batch, positions, classes]`."""
        seen = self.token(inputs.long()) + self.place(self.places)
        seen = seen + self.attention(self.before_attention(seen))
        seen = seen + self.steps(self.before_steps(seen))
        return self.output(self.last(seen))

    def attention(self, seen: Tensor) -> Tensor:
        """Return the sum over earlier positions, `[batch, positions, width]`."""
        batch, positions, width = seen.shape
        query, key, value = self.mixed(seen).view(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(self.future, float("-inf")).softmax(dim=-1)
        return self.joined((weights @ value).transpose(1, 2).reshape(batch, positions, width))
