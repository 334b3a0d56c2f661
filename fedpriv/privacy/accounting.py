"""What a release costs: the only place that makes DpEvents and asks dp-accounting about them.

Every figure here is an upper bound on epsilon. Where two valid bounds are known, the smaller is reported together
with the name of the accountant that proved it. `noise_multiplier` is always noise std / l2_sensitivity, the
sensitivity being B for add-or-remove and 2 B for replace, when one message is bounded by B.

dp-accounting counts noise in other units, and not in the same ones everywhere:

| event, neighbouring relation                    | its noise multiplier is | in ours, add-or-remove | replace |
|---|---|---|---|
| Gaussian, ADD_OR_REMOVE_ONE                     | std / sensitivity       | 1                      | 1       |
| PoissonSampled(Gaussian), ADD_OR_REMOVE_ONE     | std / B                 | 1                      |         |
| PoissonSampled(Gaussian), REPLACE_ONE (PLD)     | std / B                 |                        | 2       |
| SampledWithoutReplacement(Gaussian), REPLACE_ONE (RDP) | std / (2 B)      | 1/2                    | 1       |

Sources: dp-accounting's privacy loss distributions (Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, "Connect the
Dots"); Renyi accounting of sampling without replacement (Wang, Balle, Kasiviswanathan 2019, Theorem 27).
"""

import importlib.metadata
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import dp_accounting as dpa
import numpy as np
from dp_accounting.pld import privacy_loss_distribution, privacy_loss_mechanism

from fedpriv.errors import UserError
from fedpriv.privacy.sampling import Everyone, FixedSize, Poisson, Sampling, Scheduled

__all__ = ["Bound", "calibrate", "epsilon_spent", "least_bound", "round_event"]

Relation = dpa.NeighboringRelation
Losses = privacy_loss_distribution.PrivacyLossDistribution

VERSION = importlib.metadata.version("dp-accounting")
PLD = f"PLD (dp-accounting {VERSION})"
RDP = f"RDP (dp-accounting {VERSION})"
NO_NOISE = "none, there is no noise"

ORDERS: tuple[tuple[float, ...], ...] = (
    (1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, *range(5, 17)),
    (18, 20, 22, 24, 28, 32, 36, 40, 48, 56, 64),
    (80, 96, 128),
    (256, 512, 1024, 2048, 4096),
)
"""Renyi orders in groups of growing cost; a group is looked at only if the one before it improved the bound."""

LARGEST_SHIFT = 1e3
"""Of sensitivity / std, the largest that is accounted for. Beyond it epsilon exceeds 500 000 and counts as infinite."""

MOST_NOISE = 1e6
"""Noise multipliers above are accounted for as this one, lest the squares of losses drown in rounding."""

LARGEST_TARGET = 1e5
"""Largest epsilon to calibrate for."""

ROUNDING = 1e-15
"""Mass that one convolution's rounding can misplace; the accountant's delta is lowered by this a round."""

LARGEST_EXPONENT = 690.0
"""Of exp, with room for the small probabilities that it is multiplied by."""

FINEST = 1e-8
"""Least interval between losses; differences of probabilities over less would be mostly rounding."""

MOST_LOSSES = 60_000
"""Most points of one round's grid; bounds time and memory where the loss has an extreme tail. A twentieth of it where
epsilon exceeds 10 000 and precision serves nobody."""


class Bound(NamedTuple):
    """An upper bound on epsilon, who proved it, and whether it is owed to the sampling of clients."""

    epsilon: float
    accountant: str
    amplified: bool


def epsilon_spent(
    *,
    trust: str,
    adjacency: str,
    sampling: Sampling,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    horizon: int | None = None,
    client_memory: bool = False,
) -> float:
    """Returns an epsilon for which the first `rounds` rounds are (epsilon, `delta`)-differentially private.

    Args:
        trust: central: only noised sums (or what follows from them) are seen. local: every message is seen, and whose
            it is; a client is then charged for all `rounds` rounds, whatever the sampling.
        adjacency: add-or-remove: a client's message is there or is zero. replace: it is any other bounded message.
        sampling: Who takes part; the object that also draws the cohorts.
        noise_multiplier: Noise std / l2_sensitivity, at least 0.
        rounds: Number of rounds charged, at least 0.
        delta: In (0, 1).
        horizon: Number of rounds for which the accountant's grid is laid out (default: `rounds`). Asked about many
            `rounds` at one horizon, the answers share one grid and never fall.
        client_memory: Whether clients remember earlier rounds. No amplification is then claimed for fixed-size
            cohorts: who took part decides who else did, the others' memories keep it, and their later messages show
            it. (Poisson cohorts are safe: there the others' participation says nothing about a client's own.)

    Returns:
        At least 0; `math.inf` if rounds happened and nothing is guaranteed.

    Formal guarantees:
        An upper bound, adaptive composition included. For everyone, and for every local plan, it is within 1 % of
        the exact epsilon of the Gaussian mechanism (Balle & Wang 2018, Theorem 8). Fixed-size sampling under
        add-or-remove has a public n, so that a removed client is one whose message became zero. That is a special
        replacement (hence the bound for replace, at sensitivity 2 B), and given the cohorts it moves each sum by at
        most B (hence the bound without amplification, at sensitivity B). The smaller is returned.
    """
    return least_bound(
        trust=trust,
        adjacency=adjacency,
        sampling=sampling,
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        delta=delta,
        horizon=horizon,
        client_memory=client_memory,
    ).epsilon


@lru_cache(maxsize=2**15)
def least_bound(
    *,
    trust: str,
    adjacency: str,
    sampling: Sampling,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    horizon: int | None = None,
    client_memory: bool = False,
) -> Bound:
    """The smallest proven bound, with its accountant. Arguments and guarantees are those of `epsilon_spent`."""
    if rounds == 0:
        return Bound(0.0, PLD, False)
    if noise_multiplier == 0.0:
        return Bound(math.inf, NO_NOISE, False)
    noise_multiplier = min(noise_multiplier, MOST_NOISE)
    releases = _releases(trust, sampling, rounds)
    if releases == 0.0:
        return Bound(0.0, PLD, False)
    whole = Bound(_unsampled_epsilon(noise_multiplier, releases, delta), PLD, False)
    if isinstance(sampling, Scheduled):
        if adjacency != "replace":
            raise ValueError("a client that is gone would change everybody's timeline: only replace can be accounted")
        return whole
    if whole.epsilon == 0.0 or (client_memory and isinstance(sampling, FixedSize)):
        return whole
    event, relation = round_event(
        trust=trust, adjacency=adjacency, sampling=sampling, noise_multiplier=noise_multiplier
    )
    return min(
        [whole, *_sampled_bounds(event, relation, rounds, delta, horizon or rounds)], key=lambda bound: bound.epsilon
    )


def round_event(
    *, trust: str, adjacency: str, sampling: Sampling, noise_multiplier: float
) -> tuple[dpa.DpEvent, Relation]:
    """One round as dp-accounting sees it, in the units of the table above: its event and neighbouring relation.

    Args:
        trust: As for `epsilon_spent`. Local: no sampling event, for the server sees who took part.
        adjacency: As for `epsilon_spent`.
        sampling: Gives the event its probability (Poisson) or its sizes (fixed size).
        noise_multiplier: Noise std / l2_sensitivity, above 0.
    """
    replace = adjacency == "replace"
    if trust == "local" or isinstance(sampling, Everyone | Scheduled):
        return dpa.GaussianDpEvent(noise_multiplier), Relation.ADD_OR_REMOVE_ONE
    if isinstance(sampling, Poisson):
        noise = dpa.GaussianDpEvent(2.0 * noise_multiplier if replace else noise_multiplier)
        relation = Relation.REPLACE_ONE if replace else Relation.ADD_OR_REMOVE_ONE
        return dpa.PoissonSampledDpEvent(sampling.sampling_prob, noise), relation
    noise = dpa.GaussianDpEvent(noise_multiplier if replace else 0.5 * noise_multiplier)
    return _subset_event(sampling, noise), Relation.REPLACE_ONE


def calibrate(
    *,
    trust: str,
    adjacency: str,
    sampling: Sampling,
    rounds: int,
    delta: float,
    epsilon: float,
    client_memory: bool = False,
) -> float:
    """Returns the smallest noise multiplier whose `epsilon_spent` is at most `epsilon`, to within 1 % of epsilon.

    Args:
        trust: As for `epsilon_spent`.
        adjacency: As for `epsilon_spent`.
        sampling: As for `epsilon_spent`.
        rounds: Number of rounds; 0 is calibrated as 1.
        delta: In (0, 1).
        epsilon: Target, finite and above 0.
        client_memory: As for `epsilon_spent`.

    Raises:
        UserError: If epsilon is above `LARGEST_TARGET` or too small to be resolved; or if delta is no smaller than the
            chance that a given client ever takes part. Sending some clients' data in the clear would then be
            (0, delta)-private, and no noise would be asked for.

    Formal guarantees:
        The result has been evaluated by `epsilon_spent` itself and found at most `epsilon`: a search that ends early
        ends with too much noise, never with too little.
    """
    rounds = max(rounds, 1)
    if _releases(trust, sampling, rounds) == 0.0:
        raise ValueError("no client ever sends anything that counts: there is nothing to calibrate for")
    _check_target(trust, sampling, rounds, delta, epsilon)

    def within(noise_multiplier: float) -> float:
        """Target over spent: at least 1 is private enough."""
        spent = epsilon_spent(
            trust=trust,
            adjacency=adjacency,
            sampling=sampling,
            noise_multiplier=noise_multiplier,
            rounds=rounds,
            delta=delta,
            client_memory=client_memory,
        )
        return epsilon / spent if spent > 0.0 else math.inf

    enough = _certainly_enough(_releases(trust, sampling, rounds), delta, epsilon)
    if within(enough) < 1.0:
        remedy = "Raise privacy.epsilon; so small a one cannot be told from rounding"
        raise UserError("privacy.epsilon", "a target that the accountant can resolve", epsilon, remedy)
    factor = 1.5
    while within(enough / factor) >= 1.0:
        enough, factor = enough / factor, factor**2
    return _narrow(within, enough / factor, enough)


def _narrow(within: Callable[[float], float], too_little: float, enough: float) -> float:
    """Narrows the bracket until 0.5 % of epsilon, or 1e-6 of the noise, is left; returns its safe end.

    Interpolation (log noise against log epsilon, nearly a line) and bisection take turns.
    """
    low, high, interpolate = within(too_little), within(enough), True
    while high > 1.005 and enough > too_little * (1.0 + 1e-6):
        share = _share_left(low, high) if interpolate else 0.5
        middle = too_little**share * enough ** (1.0 - share)
        ratio, interpolate = within(middle), not interpolate
        if ratio >= 1.0:
            enough, high = middle, ratio
        else:
            too_little, low = middle, ratio
    return enough


def _share_left(low: float, high: float) -> float:
    """How far from the safe end to look, in shares of the bracket: where the line reaches 1.0025."""
    down, up = (math.log(min(max(ratio, 1e-3), 1e3) / 1.0025) for ratio in (low, high))
    return min(max(up / (up - down), 0.02), 0.98)


def _certainly_enough(rounds: float, delta: float, epsilon: float) -> float:
    """A safe noise multiplier: shift mu costs at most mu^2 / 2 + mu sqrt(2 log(1 / delta)) (Bun & Steinke 2016)."""
    tail = math.sqrt(2.0 * math.log(1.0 / delta))
    shift = 2.0 * epsilon / (tail + math.sqrt(tail**2 + 2.0 * epsilon))
    return 1.01 * math.sqrt(rounds) / shift


def _check_target(trust: str, sampling: Sampling, rounds: int, delta: float, epsilon: float) -> None:
    hidden = trust == "central" and not isinstance(sampling, Scheduled)
    chance = min(1.0, rounds * sampling.sampling_prob) if hidden else 1.0
    if delta >= chance:
        expected = f"a delta below {chance:g}, the chance that a given client ever takes part"
        raise UserError("privacy.delta", expected, delta, "Lower privacy.delta; well below 1 / clients is usual")
    if not 0.0 < epsilon <= LARGEST_TARGET:
        expected = f"a number above 0 and at most {LARGEST_TARGET:g}"
        raise UserError("privacy.epsilon", expected, epsilon, "Below 10 is usual; above it little is promised")


def _subset_event(sampling: FixedSize, noise: dpa.DpEvent) -> dpa.DpEvent:
    return dpa.SampledWithoutReplacementDpEvent(int(sampling.population), int(sampling.size), noise)


def _sampled_bounds(event: dpa.DpEvent, relation: Relation, rounds: int, delta: float, horizon: int) -> list[Bound]:
    """The bounds that credit sampling: none if the event does not sample, or has next to no noise."""
    if isinstance(event, dpa.GaussianDpEvent) or _noise(event) * LARGEST_SHIFT < 1.0:
        return []
    if isinstance(event, dpa.PoissonSampledDpEvent) and event.sampling_probability < 1.0:
        return [Bound(_poisson_epsilon(event, relation, rounds, delta, horizon), PLD, True)]
    if isinstance(event, dpa.SampledWithoutReplacementDpEvent) and event.sample_size < event.source_dataset_size:
        return [Bound(_subset_epsilon(event, rounds, delta), RDP, True)]
    return []


def _releases(trust: str, sampling: Sampling, rounds: int) -> float:
    """How many times the first `rounds` rounds release a message of full weight of whoever is charged most."""
    if isinstance(sampling, Scheduled):
        return sampling.charge(rounds, each_message=trust == "local")
    return float(rounds)


def _unsampled_epsilon(noise_multiplier: float, rounds: float, delta: float) -> float:
    """The Gaussian mechanism `rounds` times, that is once with sqrt(rounds) times the sensitivity.

    The sensitivity is in the multiplier, so the relation is ADD_OR_REMOVE_ONE; REPLACE_ONE would double it again.
    """
    shift = math.sqrt(rounds) / noise_multiplier
    if shift > LARGEST_SHIFT:
        return math.inf
    losses = privacy_loss_distribution.from_gaussian_mechanism(
        1.0 / shift,
        neighboring_relation=Relation.ADD_OR_REMOVE_ONE,
        log_mass_truncation_bound=_negligible(delta, 1),
        value_discretization_interval=max(shift * (20.0 + shift) / 5000.0, FINEST),
    )
    return _epsilon_at(losses, delta)


def _poisson_epsilon(
    event: dpa.PoissonSampledDpEvent, relation: Relation, rounds: int, delta: float, horizon: int
) -> float:
    losses, epsilon = _poisson_losses(event, relation, horizon, delta)
    return epsilon if rounds == horizon else _composed_epsilon(losses, rounds, delta)


@lru_cache(maxsize=16)
def _poisson_losses(
    event: dpa.PoissonSampledDpEvent, relation: Relation, horizon: int, delta: float
) -> tuple[Losses, float]:
    """One round's privacy losses, on a grid laid out for the epsilon of `horizon` rounds, and that epsilon.

    Epsilon is approached from above: each grid gives a bound, and each bound the next, finer grid.
    """
    ratio = _noise(event) / (2.0 if relation is Relation.REPLACE_ONE else 1.0)
    guess = min(_unsampled_epsilon(ratio, horizon, delta), 1e6)
    while True:
        losses = _losses_of_one_round(event, relation, guess, horizon, delta)
        epsilon = _composed_epsilon(losses, horizon, delta)
        if epsilon == 0.0 or epsilon > guess / 2.0:
            return losses, epsilon
        guess = epsilon


def _losses_of_one_round(
    event: dpa.PoissonSampledDpEvent, relation: Relation, epsilon: float, horizon: int, delta: float
) -> Losses:
    """One round's privacy losses, on a grid that tells an `epsilon` of `horizon` rounds within about 0.6 %.

    Rounding to the grid adds to each round a variance of about a sixth of the squared interval: hence the root.
    """
    noise, prob, cut = _noise(event), event.sampling_probability, _negligible(delta, horizon)
    fine = min(0.04 * epsilon, 0.08 * math.sqrt(epsilon)) / math.sqrt(horizon)
    most = MOST_LOSSES if epsilon < 1e4 else MOST_LOSSES / 20
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=prob,
        neighboring_relation=relation,
        log_mass_truncation_bound=cut,
        value_discretization_interval=max(fine, FINEST, _loss_range(noise, prob, relation, cut) / most),
    )


def _loss_range(noise: float, prob: float, relation: Relation, cut: float) -> float:
    """Distance between the largest and the smallest privacy loss of one round that is not cut off."""
    kind = privacy_loss_mechanism.AdjacencyType
    bounds = privacy_loss_mechanism.GaussianPrivacyLoss(
        noise,
        sampling_prob=prob,
        log_mass_truncation_bound=cut,
        adjacency_type=kind.REPLACE if relation is Relation.REPLACE_ONE else kind.REMOVE,
    ).connect_dots_bounds()
    assert bounds.epsilon_upper is not None
    assert bounds.epsilon_lower is not None
    return float(bounds.epsilon_upper - bounds.epsilon_lower)


def _noise(event: dpa.DpEvent) -> float:
    """The Gaussian inside a sampling event, in that event's units."""
    assert isinstance(event, dpa.PoissonSampledDpEvent | dpa.SampledWithoutReplacementDpEvent)
    assert isinstance(event.event, dpa.GaussianDpEvent)
    return event.event.noise_multiplier


def _negligible(delta: float, rounds: int) -> float:
    """Log of the mass that a round may count as an infinite loss: a millionth of delta over all rounds."""
    return max(math.log(delta) - math.log(1e6 * rounds), -LARGEST_EXPONENT)


def _composed_epsilon(losses: Losses, rounds: int, delta: float) -> float:
    """Epsilon of `rounds` independent losses; infinite where delta is too small to be told from rounding."""
    resolved = delta - ROUNDING * rounds
    if resolved <= 0.0:
        return math.inf
    return _epsilon_at(losses.self_compose(rounds, 1e-6 * delta), resolved)


def _epsilon_at(losses: Losses, delta: float) -> float:
    """The epsilon of privacy losses at `delta`; by search where exp(epsilon) would overflow."""
    with np.errstate(over="ignore"):
        epsilon = float(losses.get_epsilon_for_delta(delta))
    if epsilon < LARGEST_EXPONENT or losses.get_delta_for_epsilon(LARGEST_EXPONENT) <= delta:
        return epsilon
    return _search_epsilon(losses, delta)


def _search_epsilon(losses: Losses, delta: float) -> float:
    """The same as `_epsilon_at` without exponentials of epsilon: bisection from above, to 1e-12."""
    low, high = LARGEST_EXPONENT, 2.0 * LARGEST_EXPONENT
    while losses.get_delta_for_epsilon(high) > delta:
        if math.isinf(high):
            return math.inf
        low, high = high, 2.0 * high
    while high - low > 1e-12 * high:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if losses.get_delta_for_epsilon(middle) <= delta else (middle, high)
    return high


def _subset_epsilon(event: dpa.SampledWithoutReplacementDpEvent, rounds: int, delta: float) -> float:
    """Smallest epsilon over the Renyi orders, which falls and then rises with the order."""
    best = math.inf
    for orders in ORDERS:
        losses = (rounds * _renyi_losses(event, orders)).tolist()
        epsilon = float(dpa.rdp.compute_epsilon(orders, losses, delta)[0])
        if epsilon >= best:
            break
        best = epsilon
    return best


@lru_cache(maxsize=64)
def _renyi_losses(event: dpa.SampledWithoutReplacementDpEvent, orders: tuple[float, ...]) -> np.ndarray:
    """Renyi divergence of one round at each order; it adds up over rounds."""
    return dpa.rdp.RdpAccountant(orders, Relation.REPLACE_ONE).compose(event).rdp
