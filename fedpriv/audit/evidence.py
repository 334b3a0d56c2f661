"""Evidence: the scores of all candidates of an attacked run, by trust."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fedpriv.audit.attack import Attack, Released
from fedpriv.audit.canaries import Canaries
from fedpriv.audit.scores import Null, coordinate_scores, gram, projections

__all__ = ["Evidence", "FinalModel", "attack_central", "attack_local"]

# Directions that are in no run, to check the null with; fewer of them if they are long.
_UNSEEN, _FEWEST_UNSEEN, _UNSEEN_FLOATS = 10_000, 1_000, 2**26


@dataclass(frozen=True, kw_only=True)
class FinalModel:
    """How the canaries show in the last model alone.

    Args:
        scores: Projections of the model's move on each seen canary's direction, N(0, 1) without it, `[seen]`.
        shares: What each canary's signs add up to in the move, `[seen]`; see `final_model`.
        reach: The same for a client that pushes one way whenever it takes part; mean of all seen.
    """

    scores: np.ndarray
    shares: np.ndarray
    reach: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Scores of one attacked run; `candidates` are those along random directions.

    Args:
        whitened: See `fedpriv.audit.scores`, `[candidates]`.
        matched: Likewise.
        coordinate: Of canaries along coordinates, `[coordinate canaries]`.
        unseen: Whitened scores of directions that were in no run, `[unseen]`.
        unaware: Whitened scores of an auditor that does not know the cohorts, `[candidates]`; None if all know them.
        final: How the canaries show in the last model.
    """

    whitened: np.ndarray
    matched: np.ndarray
    coordinate: np.ndarray
    unseen: np.ndarray
    unaware: np.ndarray | None
    final: FinalModel


def attack_central(attack: Attack, watch: Callable[[int], None]) -> Evidence:
    """Run the attack on a server that adds the noise, and score what it releases: the noised sums."""
    canaries, released = attack.canaries, attack.run(watch=watch)
    sums, inner = released.sums, gram(released.sums)
    null, patterns = Null.of(inner, sums.shape[1]), canaries.patterns[: canaries.isotropic]
    projected = projections(canaries.directions, sums)
    hidden = attack.server.sampling.sampling_prob < 1.0
    signs = canaries.signs[: canaries.isotropic].astype(np.float64)
    return Evidence(
        whitened=null.whitened(projected, patterns),
        matched=null.matched(projected, patterns),
        coordinate=coordinate_scores(
            sums[:, canaries.coordinates].T.double().numpy(), canaries.patterns[canaries.isotropic :]
        ),
        unseen=_unseen_scores(null, canaries, sums, _unseen_count(sums.shape[1]), 0),
        unaware=null.whitened(projected, signs) if hidden else None,
        final=final_model(canaries, released, inner),
    )


def attack_local(attack: Attack, watch: Callable[[int], None]) -> Evidence:
    """Run the attack on clients that add the noise themselves, and score every canary by its own messages."""
    canaries, size = attack.canaries, attack.canaries.directions.shape[1]
    rounds, along = canaries.signs.shape[1], canaries.isotropic
    each = math.ceil(_unseen_count(size) / len(canaries.planted))
    sums = torch.zeros(rounds, size, dtype=torch.float64)
    whitened, matched, coordinate = np.zeros(along), np.zeros(along), np.zeros(len(canaries.coordinates))
    unseen = []
    for position, candidate in enumerate(canaries.planted.tolist()):
        present = np.flatnonzero(canaries.takes_part[candidate])
        if not len(present):
            continue
        messages, pattern = attack.messages(position), canaries.patterns[candidate : candidate + 1, present]
        sums[present] += messages
        if candidate >= along:
            column = messages[:, canaries.coordinates[candidate - along]].numpy()
            coordinate[candidate - along] = coordinate_scores(column[None], pattern)[0]
            continue
        null = Null.of(gram(messages), size)
        projected = projections(canaries.directions[candidate : candidate + 1], messages)
        whitened[candidate] = null.whitened(projected, pattern)[0]
        matched[candidate] = null.matched(projected, pattern)[0]
        unseen.append(_unseen_scores(null, canaries, messages, each, position, present))
    released = attack.run(sums, watch)
    return Evidence(
        whitened=whitened,
        matched=matched,
        coordinate=coordinate,
        unseen=np.concatenate(unseen),
        unaware=None,
        final=final_model(canaries, released, gram(released.sums)),
    )


def _unseen_count(size: int) -> int:
    return max(min(_UNSEEN, _UNSEEN_FLOATS // size), _FEWEST_UNSEEN)


def _unseen_scores(
    null: Null, canaries: Canaries, releases: torch.Tensor, count: int, turn: int, present: np.ndarray | None = None
) -> np.ndarray:
    """Whitened scores of candidates that are in no run, in the rounds `present` (None: in a candidate's)."""
    directions, signs = canaries.unseen(count, turn)
    if present is not None:
        patterns = signs[:, present]
    else:
        patterns = signs * canaries.takes_part[np.arange(count) % len(canaries.coins)]
    return null.whitened(projections(directions, releases), patterns)


def final_model(canaries: Canaries, released: Released, inner: np.ndarray) -> FinalModel:
    """Return how canaries show in x_K - x_0, the move of the model.

    A server rule makes of the sums about x_K - x_0 = sum_k h_k S_k, exactly so if it is linear. The weights h follow
    from least squares. A canary's share is then sum_k h_k sign_k, and sum_k |h_k| is the most that a client can have.

    Args:
        canaries: Who took part.
        released: What was released.
        inner: The Gram matrix of its sums.
    """
    move, size = (released.last - released.first).double(), len(released.first)
    along = projections(move.unsqueeze(0), released.sums)[0]
    values, vectors = np.linalg.eigh(inner)
    kept = values > 1e-10 * max(float(values[-1]), 1e-300)
    weights = vectors[:, kept] @ ((vectors[:, kept].T @ along) / values[kept])
    seen = canaries.seen
    length = max(float(torch.linalg.vector_norm(move)), 1e-300)
    return FinalModel(
        scores=(canaries.directions[seen].double() @ move).numpy() * math.sqrt(size) / length,
        shares=(canaries.coins[seen, None] * canaries.patterns[seen]) @ weights,
        reach=float((canaries.takes_part[seen] @ np.abs(weights)).mean()),
    )
