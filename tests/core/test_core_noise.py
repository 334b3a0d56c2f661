"""Noise: the right size, on both sides, and never the same twice."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import accepts_law, accepts_variance
from scipy import stats
from torch import Tensor

from fedpriv.noise import client_noise, server_noise
from fedpriv.streams import SeededStreams, Streams, SystemStreams

SIZE = 200_000

KINDS: dict[str, Streams] = {"seeded": SeededStreams(4), "system": SystemStreams()}
SIDES: dict[str, Callable[[Streams, float], Tensor]] = {
    "server": lambda streams, stddev: server_noise(streams, stddev, SIZE, 1),
    "client": lambda streams, stddev: client_noise(streams, stddev, SIZE, 1, 3),
}
every_kind = pytest.mark.parametrize("streams", KINDS.values(), ids=KINDS.keys())
every_side = pytest.mark.parametrize("draw", SIDES.values(), ids=SIDES.keys())


@every_kind
@every_side
@pytest.mark.parametrize("stddev", [1e-6, 0.3, 1.0, 250.0])
def test_noise_is_normal_with_the_standard_deviation_asked_for(
    draw: Callable[[Streams, float], Tensor], streams: Streams, stddev: float
) -> None:
    noise = draw(streams, stddev)
    assert noise.shape == (SIZE,)
    assert noise.dtype == torch.float32
    assert noise.device.type == "cpu"
    samples = noise.numpy().astype(np.float64)
    assert accepts_variance(samples, stddev**2)
    assert accepts_law(samples / stddev, stats.norm.cdf)


@every_kind
@every_side
def test_noise_of_another_scale_would_be_noticed(draw: Callable[[Streams, float], Tensor], streams: Streams) -> None:
    noise = draw(streams, 0.7).numpy()
    for wrong in (0.7 * 1.05, 0.7 / 1.05, 0.7**2, 0.7**0.5):
        assert not accepts_variance(noise, wrong**2)


@every_side
@pytest.mark.parametrize("kind", ["seeded", "system"])
def test_without_standard_deviation_noise_is_exactly_zero(draw: Callable[[Streams, float], Tensor], kind: str) -> None:
    assert torch.equal(draw(KINDS[kind], 0.0), torch.zeros(SIZE))


def test_every_round_every_client_and_the_server_have_noise_of_their_own() -> None:
    streams = SeededStreams(0)
    rounds = range(1, 6)
    found = [server_noise(streams, 1.0, 8, round) for round in rounds]  # noqa: A001
    found += [client_noise(streams, 1.0, 8, round, client) for round, client in itertools.product(rounds, range(6))]  # noqa: A001
    assert len({tuple(noise.tolist()) for noise in found}) == len(found)
    shared = torch.cat(found)
    assert len(shared.unique()) == len(shared)


def test_seeded_noise_depends_on_its_address_alone() -> None:
    for draw in SIDES.values():
        assert torch.equal(draw(SeededStreams(9), 0.5), draw(SeededStreams(9), 0.5))
        assert not torch.equal(draw(SeededStreams(9), 0.5), draw(SeededStreams(10), 0.5))


def test_noise_scales_with_its_standard_deviation_and_no_other_law() -> None:
    for draw in SIDES.values():
        assert torch.equal(draw(SeededStreams(9), 4.0), 4.0 * draw(SeededStreams(9), 1.0))


def test_the_sum_of_client_noises_has_the_sum_of_their_variances() -> None:
    streams, clients = SeededStreams(3), 16
    total = sum((client_noise(streams, 0.5, 20_000, 2, client) for client in range(clients)), torch.zeros(20_000))
    assert accepts_variance(total.numpy(), 0.25 * clients)
    assert not accepts_variance(total.numpy(), 0.25 * clients * 1.1)


def test_system_noise_never_repeats() -> None:
    streams = SystemStreams()
    assert not torch.equal(server_noise(streams, 1.0, 8, 1), server_noise(streams, 1.0, 8, 1))
    assert not torch.equal(client_noise(streams, 1.0, 8, 1, 1), client_noise(streams, 1.0, 8, 1, 1))
