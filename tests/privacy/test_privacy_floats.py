"""Attacks on floating-point noise, each against the classes that release values.

An adversary knows two candidate messages. With noise that is added in floating point, a released number often cannot
have come from one of them: which floats `message + noise` reaches depends on the message (Mironov 2012). On the grid,
both candidates reach the same numbers, and no attack can do better than the plan's epsilon allows.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from support.noise_faults import rows_by
from torch import Tensor

import fedpriv.mechanisms.noise
from fedpriv.experiment.build import assemble
from fedpriv.experiment.config import parse_config
from fedpriv.methods import DPFedAvg
from fedpriv.privacy import Everyone, PrivacyPlan, TrustName, make_plan
from fedpriv.rounds import ClientRules, ServerRules, client_round, finish_round, make_agreement
from fedpriv.streams import SeededStreams, Streams, SystemStreams

SIZE, TRIALS, APART = 1000, 200, 1e-3
METHOD = DPFedAvg(clip_norm=1.0, server_lr=1.0)

Play = Callable[[Streams, int, bool], Tensor]


def plan_of(trust: TrustName, epsilon: float = 1.0) -> PrivacyPlan:
    return make_plan(
        trust=trust, sampling=Everyone(10), rounds=1, delta=1e-5, l2_bound=1.0, epsilon=epsilon, client_memory=False
    )


def candidates(apart: float) -> tuple[Tensor, Tensor]:
    """Return two messages of one client that differ by `apart`."""
    rng = np.random.default_rng(3)
    one, direction = rng.normal(size=SIZE) / 40, rng.normal(size=SIZE)
    other = one + apart * direction / np.linalg.norm(direction)
    return torch.from_numpy(one).float(), torch.from_numpy(other).float()


def play_local(rules: ClientRules) -> Play:
    one, other = candidates(APART)

    def play(streams: Streams, trial: int, world: bool) -> Tensor:
        own = ClientRules(method=rules.method, noise_stddev=rules.noise_stddev, streams=streams)
        return client_round(own, trial, METHOD.init_client(SIZE), other if world else one, 1)[0]

    return play


def play_central(rules: ServerRules) -> Play:
    """Return the model after round 1 with the sum of the other nine known; the client is present or not."""
    known = torch.from_numpy(np.random.default_rng(4).normal(size=SIZE))
    one, _ = candidates(APART)
    start = METHOD.init_server(torch.zeros(SIZE))

    def play(streams: Streams, trial: int, world: bool) -> Tensor:
        own = ServerRules(method=METHOD, sampling=rules.sampling, mechanism=rules.mechanism, streams=streams)
        total = known + (APART * one.double() if world else 0.0)
        return finish_round(own, start, trial + 1, total).model

    return play


@dataclasses.dataclass(frozen=True)
class View:
    """The adversary's view of a noisy vector, and its approximate inverse.

    Args:
        of: Rounds and scales the vector as the product does.
        undo: Its inverse, up to rounding.
    """

    of: Callable[[np.ndarray], np.ndarray]
    undo: Callable[[np.ndarray], np.ndarray]


def impossible(released: Tensor, message: Tensor, view: View) -> int:
    """Return the number of coordinates that `message` plus float32 noise cannot produce in `view`."""
    seen, known = released.double().numpy(), message.double().numpy()
    guess = (view.undo(seen) - known).astype(np.float32)
    near = [guess]
    for _ in range(2):
        near = [*near, np.nextafter(near[0], np.float32(-np.inf)), np.nextafter(near[-1], np.float32(np.inf))]
        near.sort(key=lambda x: float(x[0]))
    return int((~np.any([view.of(known + noise.astype(np.float64)) == seen for noise in near], axis=0)).sum())


def wrong_guesses(play: Play, worlds: tuple[Tensor, Tensor], view: View) -> int:
    """Count the attacker's wrong guesses in `TRIALS`: it names the world with fewer impossible coordinates."""
    coin = np.random.default_rng(5).integers(2, size=TRIALS).astype(bool)
    wrong = 0
    for trial, world in enumerate(coin):
        released = play(SystemStreams() if trial % 2 else SeededStreams(trial), trial, bool(world))
        counts = [impossible(released, message, view) for message in worlds]
        tie = bool(trial % 3 == 0)
        wrong += (counts[0] > counts[1] if counts[0] != counts[1] else tie) != world
    return wrong


def to_float32(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32).astype(np.float64)


MESSAGE = View(to_float32, lambda seen: seen)
# As `finish_round` and dp-fedavg make a model of a noisy sum.
MODEL = View(lambda numbers: -to_float32(numbers / 10.0), lambda seen: -10.0 * seen)


def at_chance(wrong: int) -> bool:
    """Return True if `TRIALS` coin tosses could give that many wrong guesses; false alarms below 1e-9."""
    low, high = stats.binom.ppf([5e-10, 1 - 5e-10], TRIALS, 0.5)
    return low <= wrong <= high


def local_attack(plan: PrivacyPlan) -> int:
    rules = make_agreement(METHOD, Everyone(10), plan, SystemStreams()).client
    bounded = tuple(METHOD.bounded(message) for message in candidates(APART))
    return wrong_guesses(play_local(rules), (bounded[0], bounded[1]), MESSAGE)


def central_attack(plan: PrivacyPlan) -> int:
    rules = make_agreement(METHOD, Everyone(10), plan, SystemStreams()).server
    known = torch.from_numpy(np.random.default_rng(4).normal(size=SIZE))
    return wrong_guesses(play_central(rules), (known, known + APART * candidates(APART)[0].double()), MODEL)


ATTACKS = {"local": local_attack, "central": central_attack}


@pytest.mark.parametrize("trust", ATTACKS)
def test_which_floats_can_be_reached_tells_nothing(trust: TrustName) -> None:
    assert at_chance(ATTACKS[trust](plan_of(trust)))


@pytest.mark.parametrize("trust", ATTACKS)
def test_the_attack_is_certain_without_the_rounding(trust: TrustName, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former noise: a float32 draw, added to the number."""

    def float_noise(streams, purpose, stddev, values, address, grid=None, level=0):  # noqa: ARG001
        rng = np.random.default_rng([*address, int(purpose)])
        noise = rng.standard_normal(values.shape, dtype=np.float32) * np.float32(stddev)
        return values.double() + torch.from_numpy(noise).double()

    monkeypatch.setattr(fedpriv.mechanisms.noise, "_released", float_noise)
    monkeypatch.setattr(fedpriv.mechanisms.noise, "release_rows", rows_by(float_noise))
    assert ATTACKS[trust](plan_of(trust)) == 0


@pytest.mark.parametrize("trust", ATTACKS)
def test_an_attacker_who_weighs_all_numbers_stays_within_the_promise(trust: TrustName) -> None:
    """A likelihood-ratio attack on two worlds as far apart as the plan allows does no better than its epsilon."""
    plan = plan_of(trust, epsilon=0.5)
    server, client, _ = make_agreement(METHOD, Everyone(10), plan, SystemStreams())
    stddev, grid = plan.noise_stddev, fedpriv.mechanisms.noise.release_grid(plan.noise_stddev)
    one = torch.zeros(SIZE)
    other = one.clone()
    other[0] = plan.l2_sensitivity / 2.0
    right, trials = 0, 2000
    for trial in range(trials):
        world = bool(trial % 2)
        message = other if world else (-other if plan.adjacency == "replace" else one)
        if trust == "local":
            seen = float(client_round(client, trial, METHOD.init_client(SIZE), message, 1)[0][0])
        else:
            seen = float(
                fedpriv.mechanisms.noise.release_sum(SystemStreams(), server.noise_stddev, message.double(), 1)[0]
            )
        middle = 0.0 if plan.adjacency == "replace" else float(other[0]) / 2.0
        right += (seen > middle) == world
        assert seen / grid == round(seen / grid)
    apart = 2.0 * float(other[0]) if plan.adjacency == "replace" else float(other[0])
    best = stats.norm.cdf(apart / (2.0 * stddev))
    assert right <= stats.binom.ppf(1 - 1e-9, trials, best)
    assert right >= stats.binom.ppf(1e-9, trials, best * 0.98)  # and the attack has an effect


def test_the_grid_follows_from_the_plan_alone() -> None:
    """All data, cohorts, draws and levels of the sum share one grid, that of the plan's deviation."""
    plan = plan_of("central")
    grid = 2.0 ** math.floor(math.log2(plan.noise_stddev / 4.0))
    assert plan.release_grid == grid
    for values in (torch.zeros(500), torch.full((500,), 1e6 + 1 / 3), torch.randn(500) * 1e-30):
        levels = fedpriv.mechanisms.noise.release_sum(SystemStreams(), plan.noise_stddev, values.double(), 3) / grid
        assert torch.equal(levels, levels.round())
        assert (levels % 2 != 0).any()
    assert plan.as_dict()["release_grid"] == grid
    assert (plan.as_dict()["epsilon_of_sampling"], plan.as_dict()["delta_of_sampling"]) == (0.0, 0.0)


CONFIG = {
    "name": "shared noise",
    "seed": 3,
    "data": {"name": "digits", "clients": 10, "partition": "iid"},
    "model": {"name": "softmax"},
    "method": {"name": "dp-fedavg", "clip_norm": 0.5},
    "privacy": {"noise_multiplier": 2.0},
    "training": {"rounds": 2},
}


def released(changes: dict[str, dict[str, object]]) -> Tensor:
    """Return the first model of an experiment with clients that send only noise."""
    tables = {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in CONFIG.items()}
    tables |= {k: v for k, v in changes.items() if k not in tables}
    made = assemble(parse_config(tables))
    state = made.config.method.init_server(torch.zeros(650))
    return finish_round(made.server, state, 1, torch.zeros(650, dtype=torch.float64)).model / 0.5


SEMANTIC = {
    "method": {"method": {"server_lr": 0.2}},
    "data": {"data": {"partition": "dirichlet"}},
    "local work": {"local": {"work": "minibatch-gradient", "batch_size": 8}},
    "rounds": {"training": {"rounds": 3}},
    "server": {"server": {"optimizer": "momentum"}},
    "delta": {"privacy": {"delta": 1e-6}},
}


@pytest.mark.parametrize("change", SEMANTIC.values(), ids=SEMANTIC.keys())
def test_two_experiments_with_one_seed_share_no_noise(change: dict[str, dict[str, object]]) -> None:
    """The difference of two trials of a sweep must contain the noise of both."""
    one, other = released({}).double().numpy(), released(change).double().numpy()
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.25


def test_equal_experiments_have_equal_noise_whatever_they_are_called_and_when_they_are_tested() -> None:
    assert torch.equal(released({}), released({"training": {"evaluate_every": 2}}))
    config, other = parse_config(CONFIG), parse_config({**CONFIG, "name": "another"})
    assert config.noise_id == other.noise_id
    assert config.digest != other.digest
    deployed = parse_config({**CONFIG, "deployment": {"deadline": 7.0}})
    assert deployed.noise_id == config.noise_id


def test_data_cohorts_and_the_initial_model_stay_by_seed() -> None:
    one = assemble(parse_config(CONFIG))
    other = assemble(parse_config({**CONFIG, "method": {"name": "normalized-sgd"}}))
    assert torch.equal(one.initial_model, other.initial_model)
    for client in range(10):
        assert torch.equal(one.population.examples(client)[0], other.population.examples(client)[0])
