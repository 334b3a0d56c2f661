"""Shared parts of the rivals' adapters: the way to `workloads`, and the private mean for rivals that have none."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from workloads import CLIP_NORM, SERVER_LR, Workload


class Enough(Exception):  # noqa: N818
    """Raised to leave a rival's loop once enough rounds are measured."""


def private_step(model: Sequence[Tensor], clients: Iterable[Sequence[Tensor]], work: Workload) -> None:
    """Move `model`, a list of parameters, in place by the mean of the clipped updates, with noise.

    Written as a user of the rival would: one pass for each client, in place, no copies kept.

    Args:
        model: The server's parameters.
        clients: Each client's parameters after its step.
        work: Says how many clients and how much noise.
    """
    total = [torch.zeros_like(parameter) for parameter in model]
    for theirs in clients:
        update = torch._foreach_sub(theirs, model)
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(update))))
        torch._foreach_add_(total, update, alpha=min(1.0, CLIP_NORM / norm) if norm > 0.0 else 0.0)
    if work.noise_stddev:
        torch._foreach_add_(total, [torch.randn_like(part) for part in total], alpha=work.noise_stddev)
    torch._foreach_add_(model, total, alpha=SERVER_LR / work.cohort)
