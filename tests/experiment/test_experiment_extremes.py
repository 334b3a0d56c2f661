"""Numbers at the limits of a config are refused in one line or give a working round. They never cause a traceback, or a
model that is not finite.
"""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedpriv.clock import DEVICES, SCHEDULES
from fedpriv.data.augment import AUGMENTATIONS
from fedpriv.data.dataset import DATASETS
from fedpriv.data.federation import Holders
from fedpriv.data.partitions import PARTITIONS
from fedpriv.data.shifts import SHIFTS
from fedpriv.errors import UserError
from fedpriv.experiment.build import assemble, make_federation
from fedpriv.experiment.config import PrivacyChoice, Training, parse_config
from fedpriv.experiment.deployment import DeploymentChoice
from fedpriv.experiment.execution import Execution, start_engine
from fedpriv.experiment.timing import Versions
from fedpriv.mechanisms.controllers import CONTROLLERS
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS, DPFedAvg
from fedpriv.privacy import SAMPLINGS, Everyone, Poisson, make_plan
from fedpriv.rounds import begin_round, finish_round, make_agreement
from fedpriv.streams import SeededStreams
from fedpriv.tasks.kinds import TASKS
from fedpriv.tasks.local_work import LOCAL_WORKS
from fedpriv.tasks.models import MODELS

EXTREMES = (1e39, 1e308, -1e39, 1e-46, 5e-324, float("inf"), float("nan"), 0, -1, 2**63, 10**30, 10**400)

BASE: dict[str, Any] = {
    "name": "x",
    "seed": 1,
    "data": {"name": "digits", "clients": 3},
    "model": {"name": "softmax"},
    "local": {"work": "full-gradient"},
    "cohort": {"sampling": "everyone"},
    "method": {"name": "clip21"},
    "training": {"rounds": 2},
}

REQUIRED: dict[str, dict[str, dict[str, Any]]] = {
    "local": {
        "minibatch-gradient": {"batch_size": 5},
        "local-steps": {"steps": 2, "client_lr": 0.1, "batch_size": 5},
        "local-epochs": {"epochs": 1, "client_lr": 0.1, "batch_size": 400},
    },
    "cohort": {"poisson": {"probability": 0.5}, "fixed": {"size": 2}},
    "devices": {
        "same": {"speed": 100.0, "download": 1e6, "upload": 1e6},
        "log-normal": {"speed": 100.0, "download": 1e6, "upload": 1e6},
        "uniform": {"speed": [50.0, 90.0], "download": [1e5, 1e6], "upload": [1e5, 1e6]},
    },
    "augment": {"images": {"flip": True}},
    "schedule": {"fedbuff": {"buffer_size": 2, "concurrency": 3}, "fedfix": {"window": 10.0}, "token": {}},
}
"""Required keys besides the name, by table and name."""

KEYS = {
    "method": ("name", METHODS),
    "server": ("optimizer", SERVER_OPTIMIZERS),
    "local": ("work", LOCAL_WORKS),
    "cohort": ("sampling", SAMPLINGS),
    "model": ("name", MODELS),
    "task": ("name", TASKS),
    "augment": ("name", AUGMENTATIONS),
    "devices": ("kind", DEVICES),
    "schedule": ("kind", SCHEDULES),
    "controller": ("kind", CONTROLLERS),
}
NOT_NUMBERS = {"trace"}  # devices of a file


def tables_of() -> Iterator[tuple[str, str, type, dict[str, Any]]]:
    """Return a valid config for each registered dataclass: table, name, dataclass, tables."""
    for table, (key, kinds) in KEYS.items():
        for name, kind in kinds.items():
            if name in NOT_NUMBERS:
                continue
            config = BASE | {table: {key: name, **REQUIRED.get(table, {}).get(name, {})}}
            if name == "fedspeed":
                config |= {"local": {"work": "local-steps", **REQUIRED["local"]["local-steps"]}}
            if table == "controller":
                config |= {"privacy": {"noise_multiplier": 1.0}}
            if table == "schedule":
                config |= {"method": {"name": "dp-fedavg"}, "devices": {"kind": "same", **REQUIRED["devices"]["same"]}}
            yield table, name, kind, config
    for key, kinds in (("partition", PARTITIONS), ("shift", SHIFTS)):
        for name, kind in kinds.items():
            yield "data", name, kind, BASE | {"data": {**BASE["data"], key: name}}
    for trust in ("central", "local"):
        noisy = BASE | {"privacy": {"trust": trust, "noise_multiplier": 1.0}}
        yield "privacy", trust, PrivacyChoice, noisy
        yield "privacy", f"{trust} from epsilon", PrivacyChoice, BASE | {"privacy": {"trust": trust, "epsilon": 1.0}}
        yield "cohort", f"poisson {trust}", Poisson, noisy | {"cohort": {"sampling": "poisson", "probability": 0.5}}
        yield "training", trust, Training, noisy
        yield "training", f"{trust} from epsilon", Training, BASE | {"privacy": {"trust": trust, "epsilon": 1.0}}
        yield "method", f"sent {trust}", METHODS["alpha-normec"], noisy | {"method": {"name": "alpha-normec"}}
    yield "training", "", Training, BASE
    yield "deployment", "", DeploymentChoice, BASE | {"deployment": {}}


def numbers_in(kind: type) -> list[str]:
    """Return the numeric fields of a dataclass."""
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind) if field.init and field.name != "population"]
    return [name for name in fields if "int" in str(hints[name]) or "float" in str(hints[name])]


CASES = [
    pytest.param(config, table, field, kind, id=f"{table} {name} {field}".replace("  ", " "))
    for table, name, kind, config in tables_of()
    for field in numbers_in(kind)
]


@pytest.fixture(scope="module")
def federation() -> Holders:
    return make_federation(parse_config(BASE))


def first_rounds(tables: dict[str, Any], federation: Holders) -> torch.Tensor:
    """Return the model after two rounds of a config, or fewer if it has fewer."""
    config = parse_config(tables)
    experiment = assemble(config, federation=federation if tables["data"] == BASE["data"] else None)
    if experiment.plan is not None:
        assert experiment.plan.as_dict()["delta"] > 0.0
    engine, _ = start_engine(experiment, Execution(engine="vectorized"))
    state = experiment.server.init(experiment.initial_model)
    versions = None if experiment.timeline is None else Versions(experiment.timeline, {0: state.model})
    for number in range(1, min(config.training.rounds, 2) + 1):
        spent = experiment.server.filtered(state)
        if spent is not None and spent.stopped:
            break
        if versions is None:
            total = engine.sum_messages(begin_round(experiment.server, state, number))
        else:
            versions.moved(number - 1, state.model)
            total = versions.total(engine, experiment.server, number)
        state = finish_round(experiment.server, state, number, total.sum)
    engine.close()
    return state.model


@pytest.mark.parametrize(("config", "table", "field", "kind"), CASES)
def test_an_extreme_number_is_refused_in_one_line_or_works(
    config: dict[str, Any], table: str, field: str, kind: type, federation: Holders
) -> None:
    several = "tuple" in str(typing.get_type_hints(kind)[field])
    for extreme in EXTREMES:
        value = [1.0, extreme] if several else extreme
        try:
            model = first_rounds(config | {table: {**config[table], field: value}}, federation)
        except UserError:  # one line, by its constructor
            continue
        assert torch.isfinite(model).all(), f"{table}.{field} = {value}"


def test_every_registered_dataclass_is_tried() -> None:
    tried = {kind for _, _, kind, _ in tables_of()}
    for kinds in (*(kinds for _, kinds in KEYS.values()), PARTITIONS, SHIFTS):
        missing = {kind for name, kind in kinds.items() if name not in NOT_NUMBERS and kind not in tried}
        assert not missing
    assert all(numbers_in(kind) == [] or name in SIZED for name, kind in DATASETS.items())


# Data sets from files: their numbers count examples or features in the files; the readers' tests cover them.
SIZED = ("mnist", "fashion-mnist", "cifar10", "tiny-shakespeare", "libsvm")
SIZED += ("csv", "parquet", "npz", "npy", "leaf", "image-folder", "text")


@pytest.mark.parametrize("kind", [*METHODS.values(), *SERVER_OPTIMIZERS.values(), *LOCAL_WORKS.values()])
def test_a_whole_number_without_end_is_refused_where_a_dataclass_is_made(kind: type) -> None:
    """In Python, no config parser checks the values first."""
    given = {"batch_size": 5, "steps": 2, "epochs": 2, "client_lr": 0.1, "rate": 0.5}
    needed = {name: value for name, value in given.items() if name in kind.__dataclass_fields__}
    for field in numbers_in(kind):
        if field != "batch_size":  # all examples
            with pytest.raises(UserError, match=field):
                kind(**needed | {field: 10**400})


@pytest.mark.parametrize("server_lr", [1e20, 1e-20])
def test_numbers_at_the_limits_move_the_model(server_lr: float, federation: Holders) -> None:
    tables = BASE | {"method": {"name": "dp-fedavg", "server_lr": server_lr}}
    assert torch.count_nonzero(first_rounds(tables, federation))


def test_a_model_that_leaves_float32_ends_the_run_in_one_line() -> None:
    """Each number is within its limits, but their product is not."""
    method = DPFedAvg(clip_norm=1e20, server_lr=1e20)
    plan = make_plan(trust="central", sampling=Everyone(3), rounds=1, delta=1e-5, l2_bound=1e20, noise_multiplier=1.0)
    server = make_agreement(method, Everyone(3), plan, SeededStreams(1)).server
    state = method.init_server(torch.zeros(4))
    with pytest.raises(UserError, match=r"^the model after round 1: expected finite numbers, got NaN or infinity\."):
        finish_round(server, state, 1, torch.from_numpy(np.ones(4)))
