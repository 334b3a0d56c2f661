"""Non-interactive sparse regression: every user sends noised second moments once, and the server thresholds.

After the non-interactive model of arXiv 2310.07367, of which only the abstract was read; see `fedpriv.methods.sparse`.
User i with the example (x_i, y_i) sends, once,

    m_i = clip_B(y_i x_i, x_i x_i^T) + z_i

and the server computes, from the means b and A of the two parts,

    theta = H_k(A_+^{-1} b)

Ours: the upper triangle of x x^T is sent, with off-diagonal numbers times sqrt(2), so that its length is that of the
matrix; A_+ raises the eigenvalues of A to `floor`, because noise may make them small or negative; Gaussian noise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpriv.bounding import Clip, scales_of
from fedpriv.checks import require_representable, whole_within
from fedpriv.mechanisms.noise import max_level, release_clients_sum, release_message
from fedpriv.methods.sparse.threshold import hard_threshold
from fedpriv.privacy import Everyone, PrivacyPlan, make_plan
from fedpriv.streams import Streams

__all__ = ["SparseMoments"]


@dataclass(frozen=True, kw_only=True)
class SparseMoments:
    """Sparse linear regression from one noised message of each user.

    Args:
        sparsity: k, the number of parameters that may differ from zero.
        clip_norm: B, the maximum length of a message. An example with |x| and |y| sends |x| sqrt(x^2 + y^2).
        floor: The smallest eigenvalue of the inputs' second moments, a public constant.
    """

    sparsity: int = 10
    clip_norm: float = 1.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        whole_within("sparsity", self.sparsity, 1, 2**31, "Set it to a number of parameters")
        Clip(clip_norm=self.clip_norm)
        require_representable("floor", self.floor)

    def plan(self, users: int, *, epsilon: float, delta: float) -> PrivacyPlan:
        """Return the privacy plan of one round with all users: trust local, replace adjacency.

        Args:
            users: Number of users.
            epsilon: The target.
            delta: In (0, 1).
        """
        sampling = Everyone(users)
        return make_plan(
            trust="local", sampling=sampling, rounds=1, delta=delta, l2_bound=self.clip_norm, epsilon=epsilon
        )

    def messages(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the bounded messages `[users, d + d (d + 1) / 2]`, without noise.

        Args:
            inputs: x, `[users, d]`.
            targets: y, `[users]`.
        """
        rows, columns = _triangle(inputs.shape[1])
        squares = inputs[:, rows] * inputs[:, columns] * _weights(inputs.shape[1]).to(inputs)
        return Clip(clip_norm=self.clip_norm)(torch.cat([targets.unsqueeze(1) * inputs, squares], dim=1))

    def release(self, inputs: Tensor, targets: Tensor, plan: PrivacyPlan, streams: Streams) -> Iterator[Tensor]:
        """Yield every user's message with its own noise, `[d + d (d + 1) / 2]`; see `messages`."""
        self._check(plan, len(inputs))
        stddev = plan.shares.client
        level = max_level(self.clip_norm, stddev)
        for user in range(len(inputs)):
            message = self.messages(inputs[user : user + 1], targets[user : user + 1])[0]
            yield release_message(streams, stddev, level, message, 1, user)

    def simulate(self, inputs: Tensor, targets: Tensor, plan: PrivacyPlan, streams: Streams) -> Tensor:
        """Return the mean of all messages with one draw of their summed noise, float64; a simulation of `release`."""
        self._check(plan, len(inputs))
        x, y = inputs.double(), targets.double()
        squares = x.square().sum(dim=1)
        norms = (squares * (squares + y.square())).sqrt().clamp(min=1e-300)
        scales = torch.where(torch.isfinite(norms), scales_of(norms, Clip(clip_norm=self.clip_norm)), 0.0)
        x, y = (torch.nan_to_num(part, 0.0, 0.0, 0.0) for part in (x, y))
        matrix = x.T @ (scales.unsqueeze(1) * x)
        total = torch.cat([(scales * y) @ x, matrix[_triangle(x.shape[1])] * _weights(x.shape[1]).double()])
        return release_clients_sum(streams, plan.shares.client, total, 1, len(inputs)) / len(inputs)

    def estimate(self, mean: Tensor) -> Tensor:
        """Return theta `[d]`, float64, from the mean of the messages `[d + d (d + 1) / 2]`."""
        size = (math.isqrt(9 + 8 * len(mean)) - 3) // 2
        cross, squares = mean[:size].double().numpy(), mean[size:].double().numpy()
        rows, columns = (part.numpy() for part in _triangle(size))
        matrix = np.zeros((size, size))
        matrix[rows, columns] = squares / _weights(size).double().numpy()
        matrix[columns, rows] = matrix[rows, columns]
        values, vectors = np.linalg.eigh(matrix)
        solved = vectors @ ((vectors.T @ cross) / np.maximum(values, self.floor))
        return hard_threshold(torch.as_tensor(solved), self.sparsity)

    def _check(self, plan: PrivacyPlan, users: int) -> None:
        if plan.l2_bound != self.clip_norm or plan.sampling != Everyone(users) or plan.rounds != 1:
            raise ValueError(f"the plan was made for other messages: {plan}, {self}")
        if not plan.trust_rules.shows_messages:
            raise ValueError(f"the plan puts the noise at the server: {plan}")


def _triangle(size: int) -> tuple[Tensor, Tensor]:
    rows, columns = np.triu_indices(size)
    return torch.as_tensor(rows), torch.as_tensor(columns)


def _weights(size: int) -> Tensor:
    """Return the factors of the upper triangle, float64 `[d (d + 1) / 2]`."""
    rows, columns = _triangle(size)
    return torch.where(rows == columns, 1.0, math.sqrt(2.0)).double()
