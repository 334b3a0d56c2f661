"""Evidence: the scores of all candidates of an attacked run, by trust."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fedpriv.audit.attack import Attack, Released
from fedpriv.audit.canaries import Canaries
from fedpriv.audit.scores import Null, coordinate_scores, gram, projections

__all__ = ["Evidence", "attack_central", "attack_local"]

# Directions that are in no run, to check the null distribution; fewer of them if they are long.
_UNSEEN, _MIN_UNSEEN, _UNSEEN_FLOATS = 10_000, 1_000, 2**26


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Scores of one attacked run; `candidates` are those along random directions.

    Args:
        whitened: See `fedpriv.audit.scores`, `[candidates]`.
        matched: Likewise.
        coordinate: Scores of canaries along coordinates, `[coordinate canaries]`.
        unseen: Whitened scores of directions that are in no run, `[unseen]`.
        unaware: Whitened scores for an auditor who does not know the cohorts, `[candidates]`; None if cohorts are
            public.
        final: Scores of steady canaries from the last model alone, `[steady canaries]`.
    """

    whitened: np.ndarray
    matched: np.ndarray
    coordinate: np.ndarray
    unseen: np.ndarray
    unaware: np.ndarray | None
    final: np.ndarray


def attack_central(attack: Attack, watch: Callable[[int], None]) -> Evidence:
    """Run the attack on a server that adds the noise, and score the noisy sums that it releases."""
    canaries, released = attack.canaries, attack.run(watch=watch)
    sums, patterns = released.sums, canaries.patterns[: canaries.isotropic]
    null = Null.of(gram(sums), sums.shape[1])
    projected = projections(canaries.directions, sums)
    hidden = canaries.batched or attack.experiment.server.sampling.hiding_prob < 1.0
    signs = canaries.signs[: canaries.isotropic].astype(np.float64)
    return Evidence(
        whitened=null.whitened(projected, patterns),
        matched=null.matched(projected, patterns),
        coordinate=coordinate_scores(
            sums[:, canaries.coordinates].T.double().numpy(), canaries.patterns[canaries.along]
        ),
        unseen=_unseen_scores(null, canaries, sums, _unseen_count(sums.shape[1]), 0),
        unaware=null.whitened(projected, signs) if hidden else None,
        final=_final_scores(canaries, released),
    )


def attack_local(attack: Attack, watch: Callable[[int], None]) -> Evidence:
    """Run the attack on clients that add the noise themselves, and score every canary by its messages."""
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
        if candidate >= canaries.along.stop:
            continue
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
        final=_final_scores(canaries, released),
    )


def _unseen_count(size: int) -> int:
    return max(min(_UNSEEN, _UNSEEN_FLOATS // size), _MIN_UNSEEN)


def _unseen_scores(
    null: Null, canaries: Canaries, releases: torch.Tensor, count: int, turn: int, present: np.ndarray | None = None
) -> np.ndarray:
    """Return whitened scores of candidates in no run, in the rounds `present` (None: in a candidate's rounds)."""
    directions, signs = canaries.unseen(count, turn)
    if present is not None:
        patterns = signs[:, present]
    else:
        patterns = signs * np.abs(canaries.patterns[np.arange(count) % len(canaries.coins)])
    return null.whitened(projections(directions, releases), patterns)


def _final_scores(canaries: Canaries, released: Released) -> np.ndarray:
    """Return scores of steady canaries from the last model alone: a server steps against the clients' messages."""
    length = max(float(torch.linalg.vector_norm(released.move)), 1e-300)
    return (canaries.steady.double() @ released.move).numpy() * -math.sqrt(len(released.move)) / length
