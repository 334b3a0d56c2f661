"""Small audits for tests: a quick problem, and faults that are put into the product's own code."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedpriv.engines.step
import fedpriv.rounds
from fedpriv.audit.run import AuditChoice, audit_experiment
from fedpriv.audit.verdict import Findings
from fedpriv.bounding import SmoothedNormalization
from fedpriv.experiment.assemble import Experiment, assemble, make_federation
from fedpriv.experiment.config import Config, parse_config
from fedpriv.learning.federation import Holders

ROUNDS = 30
PRIVACY: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5}


def quick_config(**changes: dict[str, Any]) -> Config:
    """Twenty clients with digits, softmax, alpha-NormEC with a fading memory; tables of `changes` go over the rest."""
    tables: dict[str, Any] = {
        "name": "quick",
        "seed": 3,
        "data": {"name": "digits", "clients": 20, "partition": "iid"},
        "model": {"name": "softmax"},
        "local": {"work": "minibatch-gradient", "batch_size": 8},
        "method": {"name": "alpha-normec", "beta": 0.1, "server_normalization": False, "damping": 0.1},
        "privacy": PRIVACY,
        "training": {"rounds": ROUNDS},
    }
    return parse_config(tables | changes)


@cache
def _quick_federation() -> Holders:
    return make_federation(quick_config())


def quick_experiment(**changes: dict[str, Any]) -> Experiment:
    """The experiment of `quick_config`; its data are read once."""
    config = quick_config(**changes)
    return assemble(config, federation=None if "data" in changes else _quick_federation())


def quick_audit(
    canaries: int = 80, seed: int = 0, engine: str = "vectorized", **changes: dict[str, Any]
) -> tuple[Findings, dict[str, Any]]:
    """What an audit of the quick problem finds, and its record."""
    return audit_experiment(quick_experiment(**changes), AuditChoice(canaries=canaries, seed=seed, engine=engine))


Noise = Callable[..., Tensor]


def without(noise: Noise, *where: Any) -> Tensor:
    return torch.zeros_like(noise(*where))


def halved(noise: Noise, *where: Any) -> Tensor:
    return 0.5 * noise(*where)


def repeated(noise: Noise, streams: Any, stddev: float, size: int, round: int, *client: int) -> Tensor:  # noqa: A002, ARG001
    return noise(streams, stddev, size, 1, *client)


def forgotten(noise: Noise, streams: Any, stddev: float, size: int, round: int, *client: int) -> Tensor:  # noqa: A002
    return noise(streams, stddev, size, round, *client) * float(round % 10 != 9)


def in_half(noise: Noise, *where: Any) -> Tensor:
    drawn = noise(*where)
    drawn[: len(drawn) // 2] = 0.0
    return drawn


def in_every_other(noise: Noise, *where: Any) -> Tensor:
    drawn = noise(*where)
    drawn[::2] = 0.0
    return drawn


def in_most(noise: Noise, *where: Any) -> Tensor:
    """Three coordinates in a hundred are left out: too few for a canary in all coordinates to notice."""
    drawn = noise(*where)
    drawn[np.arange(len(drawn)) % 33 == 5] = 0.0
    return drawn


NOISE_FAULTS: dict[str, Callable[..., Tensor]] = {
    "no noise": without,
    "half the noise": halved,
    "the same noise each round": repeated,
    "noise forgotten every tenth round": forgotten,
    "noise on half the coordinates": in_half,
    "noise on every other coordinate": in_every_other,
}


def seed_noise_fault(patch: pytest.MonkeyPatch, fault: Callable[..., Tensor]) -> None:
    """Puts a fault between the product and its noise, at the server and at clients."""
    for module, name in ((fedpriv.rounds, "server_noise"), (fedpriv.engines.step, "client_noise")):
        noise = getattr(module, name)
        patch.setattr(module, name, lambda *where, noise=noise: fault(noise, *where))


def seed_bound_fault(patch: pytest.MonkeyPatch, times: float) -> None:
    """Lets messages be `times` as long as the bound that is accounted."""
    scale, numbers = SmoothedNormalization._scale, SmoothedNormalization.figures.fget
    assert numbers is not None
    patch.setattr(SmoothedNormalization, "_scale", lambda self, *norms: times * scale(self, *norms))

    def longer(self: SmoothedNormalization) -> tuple[float, ...]:
        p, q, r, t = numbers(self)
        return times * p, q, times * r, times * t

    patch.setattr(SmoothedNormalization, "figures", property(longer))
