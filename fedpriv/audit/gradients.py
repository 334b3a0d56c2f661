"""Gradients of canary clients.

A canary client has a single canary example, with the auditor's push as its gradient, longer than any bound. Its other
examples have no gradients. All else is the client's own code: batches, bounds, divisors, noise on local steps, signals.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fedpriv.bounding import Bounded, Clip
from fedpriv.privacy.records import ExampleTerms

__all__ = ["CanaryGradients", "canary_examples"]

# Longer than every bound, and far from the largest float32.
_LONG = 1e30


@dataclass(frozen=True)
class CanaryGradients:
    """Takes the place of a task: the gradients of a canary client at one model.

    Args:
        push: The canary's direction in this round, `[params]`.
        at: The round's model, `[params]`.
    """

    push: Tensor
    at: Tensor
    dtype: torch.dtype = torch.float32

    def clipped_sum(self, model: Tensor, inputs: Tensor, labels: Tensor, bound: Bounded) -> Tensor:
        """See `Task.clipped_sum`."""
        return self._of_canary(inputs, bound(_LONG * self.push.double()))

    def clipped_change(self, at: Tensor, before: Tensor, inputs: Tensor, labels: Tensor, radius: float) -> Tensor:
        """See `Task.clipped_change`."""
        return self._of_canary(inputs, Clip(clip_norm=1.0)(_LONG * self.push.double() / radius))

    def example_losses(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Task.example_losses`; no order of examples is known."""
        return torch.zeros(len(labels))

    def gradient(self, model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """See `Task.gradient`; zero at other models, so that a change is as long as a gradient."""
        return _LONG * self.push if torch.equal(model, self.at) else torch.zeros_like(self.push)

    def _of_canary(self, inputs: Tensor, bounded: Tensor) -> Tensor:
        present = bool((inputs == 0.0).any())
        return bounded if present else torch.zeros_like(bounded)


@cache
def canary_examples(terms: ExampleTerms | None) -> tuple[Tensor, Tensor]:
    """Return inputs `[examples, 1]` and labels `[examples]` of a canary client; input 0 is the canary."""
    examples = 1 if terms is None or terms.declared else terms.examples
    return torch.arange(examples).unsqueeze(1), torch.zeros(examples, dtype=torch.int64)
