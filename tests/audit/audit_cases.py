"""Small audits for tests: a quick problem, and faults injected into the product's code."""

from functools import cache
from typing import Any

import pytest
from support.noise_faults import Released, replace_noise
from torch import Tensor

from fedpriv.audit.run import Against, AuditChoice, audit_experiment
from fedpriv.audit.verdict import Findings
from fedpriv.bounding import SmoothedNormalization
from fedpriv.data.federation import Holders
from fedpriv.experiment.build import Experiment, assemble, make_federation
from fedpriv.experiment.config import Config, parse_config
from fedpriv.experiment.execution import LocalEngine

ROUNDS, CLIENTS = 30, 10
Changes = dict[str, dict[str, Any]]
PRIVACY: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5}


def quick_config(changes: Changes | None = None) -> Config:
    """Return a config: few clients, digits, softmax, alpha-NormEC with a fading memory; `changes` override it."""
    tables: dict[str, Any] = {
        "name": "quick",
        "seed": 3,
        "data": {"name": "digits", "clients": CLIENTS, "partition": "iid"},
        "model": {"name": "softmax"},
        "local": {"work": "minibatch-gradient", "batch_size": 8},
        "method": {"name": "alpha-normec", "beta": 0.1, "server_normalization": False, "damping": 0.1},
        "privacy": PRIVACY,
        "training": {"rounds": ROUNDS},
    }
    return parse_config(tables | (changes or {}))


@cache
def _quick_federation() -> Holders:
    return make_federation(quick_config())


def quick_experiment(changes: Changes | None = None) -> Experiment:
    """Return the experiment of `quick_config`; its data are read once."""
    config = quick_config(changes)
    return assemble(config, federation=None if "data" in (changes or {}) else _quick_federation())


def quick_audit(
    changes: Changes | None = None,
    canaries: int = 80,
    seed: int = 0,
    engine: LocalEngine = "vectorized",
    against: Against = "plan",
) -> tuple[Findings, dict[str, Any]]:
    """Return the findings and the record of an audit of the quick problem."""
    return audit_experiment(
        quick_experiment(changes), AuditChoice(canaries=canaries, seed=seed, engine=engine, against=against)
    )


def without(released: Released, *where: Any, **more: Any) -> Tensor:  # noqa: ARG001
    return where[3]


def halved(released: Released, streams: Any, purpose: Any, stddev: float, *where: Any, **more: Any) -> Tensor:
    return released(streams, purpose, 0.5 * stddev, *where, **more)


def repeated(
    released: Released,
    streams: Any,
    purpose: Any,
    stddev: float,
    values: Tensor,
    address: tuple[int, int],
    *rest: Any,
    **more: Any,
) -> Tensor:
    return released(streams, purpose, stddev, values, (1, address[1]), *rest, **more)


def forgotten(released: Released, *where: Any, **more: Any) -> Tensor:
    return where[3] if where[4][0] % 10 == 9 else released(*where, **more)


def in_half(released: Released, *where: Any, **more: Any) -> Tensor:
    drawn, values = released(*where, **more), where[3]
    drawn[: len(drawn) // 2] = values[: len(drawn) // 2].double()
    return drawn


def in_every_other(released: Released, *where: Any, **more: Any) -> Tensor:
    drawn = released(*where, **more)
    drawn[::2] = where[3][::2].double()
    return drawn


def forgotten_by_one(released: Released, *where: Any, **more: Any) -> Tensor:
    """The sixth canary adds no noise."""
    return where[3] if where[4][1] == CLIENTS + 5 else released(*where, **more)


NOISE_FAULTS: dict[str, Released] = {
    "no noise": without,
    "half the noise": halved,
    "the same noise each round": repeated,
    "noise forgotten every tenth round": forgotten,
    "noise on half the coordinates": in_half,
    "noise on every other coordinate": in_every_other,
}


def seed_noise_fault(patch: pytest.MonkeyPatch, fault: Released) -> None:
    """Inject a fault into all added noise, at the server and at clients."""
    replace_noise(patch, fault)


def seed_bound_fault(patch: pytest.MonkeyPatch, times: float) -> None:
    """Let messages be `times` as long as the accounted bound."""
    scale, numbers = SmoothedNormalization._scale, SmoothedNormalization.coefficients.fget
    assert numbers is not None
    patch.setattr(SmoothedNormalization, "_scale", lambda self, *norms: times * scale(self, *norms))

    def longer(self: SmoothedNormalization) -> tuple[float, ...]:
        p, q, r, t = numbers(self)
        return times * p, q, times * r, times * t

    patch.setattr(SmoothedNormalization, "coefficients", property(longer))
