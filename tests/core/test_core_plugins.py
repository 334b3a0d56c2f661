"""Names resolve to classes: built in, from a package, from a file; a new kind needs only one class and one name."""

import dataclasses
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from support.own_classes import OWN, own_config

import strategies
from fedpriv import load_config, plugins
from fedpriv.cli.catalogue import methods_table
from fedpriv.clock import SCHEDULES
from fedpriv.data.dataset import DATASETS
from fedpriv.data.partitions import PARTITIONS
from fedpriv.data.shifts import SHIFTS
from fedpriv.deploy.device.policy import POLICY_FILE, load_policy, write_default_policy
from fedpriv.errors import UserError
from fedpriv.experiment.run import run_experiment
from fedpriv.flower.messages import method_name
from fedpriv.methods import METHODS, SERVER_OPTIMIZERS, DPFedAvg
from fedpriv.methods.dp_fedavg import DPFedAvg as Defined
from fedpriv.plugins import Registry
from fedpriv.privacy import SAMPLINGS
from fedpriv.privacy.trust import TRUSTS
from fedpriv.sweeps.config import load_sweep
from fedpriv.sweeps.run import run_sweep
from fedpriv.tasks.kinds import TASKS
from fedpriv.tasks.local_work import LOCAL_WORKS
from fedpriv.tasks.models import MODELS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return own_config(tmp_path)


def registered(text: str) -> list[Any]:
    scope: dict[str, Any] = {"__name__": __name__}
    exec(text, scope)  # the classes of OWN, as a program would define them
    return [scope[name] for name in ("HalfClip", "Line", "Stripes")]


def test_every_built_in_name_leads_to_its_class_and_back() -> None:
    for registry in (METHODS, MODELS, TASKS, DATASETS, PARTITIONS):
        assert list(registry)
        for name, kind in registry.items():
            assert isinstance(kind, type)
            assert dataclasses.is_dataclass(kind)
            assert registry.name_of(object.__new__(kind)) == name
    assert METHODS["dp-fedavg"] is DPFedAvg is Defined


def test_a_method_a_model_and_a_data_set_of_a_file_run_resume_and_sweep(config: Path, tmp_path: Path) -> None:
    read = load_config(config)
    assert method_name(read.method) == f"{tmp_path / 'own.py'}:HalfClip"
    assert read.method.bounded.l2_bound == 0.5
    written = {}
    for engine in ("loop", "vectorized"):
        out = tmp_path / engine
        run_experiment(read, out, engine=engine)
        run_experiment(load_config(out / "config.toml"), out, engine=engine, resume=True)
        written[engine] = (out / "model.safetensors").read_bytes()
    assert load_config(tmp_path / "loop" / "config.toml").digest == read.digest
    assert written["loop"] == written["vectorized"]
    sweep = tmp_path / "sweep.toml"
    sweep.write_text('name = "s"\nbase = "own.toml"\n[[axis]]\nkey = "method.server_lr"\nvalues = [0.5, 1.0]\n')
    table = run_sweep(load_sweep(sweep), tmp_path / "sweep", jobs=2)  # in processes that know only names
    assert list(table["status"]) == ["done", "done"], table["reason"].tolist()


def test_one_class_and_one_line_add_a_method_a_model_and_a_data_set(tmp_path: Path) -> None:
    half, line, stripes = registered(OWN)
    METHODS.add("half-clip", half)
    MODELS.add("line", line)
    DATASETS.add("stripes", stripes)
    try:
        tables: dict[str, Any] = {
            "name": "own",
            "seed": 1,
            "data": {"name": "stripes", "clients": 5},
            "model": {"name": "line"},
            "method": {"name": "half-clip"},
            "training": {"rounds": 1},
        }
        run_experiment(load_config(tables), tmp_path / "out", engine="loop")
        assert load_config(tmp_path / "out" / "config.toml").tables["method"] == {"name": "half-clip", "server_lr": 1.0}
    finally:
        for registry, name in ((METHODS, "half-clip"), (MODELS, "line"), (DATASETS, "stripes")):
            registry.remove(name)
    with pytest.raises(UserError, match="expected a known name, got 'stripes'"):
        load_config(tables)


def test_a_class_of_a_package_is_named_by_its_module() -> None:
    tables: dict[str, Any] = {"name": "fedpriv.methods.clip21:Clip21"}
    base = {"name": "a", "seed": 1, "data": {"name": "digits", "clients": 2}, "model": {"name": "softmax"}}
    read = load_config({**base, "method": tables, "training": {"rounds": 1}})
    assert read.tables["method"]["name"] == "clip21"  # named classes keep their names, so the experiment is the same


def test_packages_add_names_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="theirs", value="fedpriv.methods.dp_fedavg:DPFedAvg", group="some.group")
    monkeypatch.setattr(plugins, "_installed", lambda group: {"theirs": point} if group == "some.group" else {})
    found: Registry[Any] = Registry("method", {}, group="some.group")
    assert list(found) == ["theirs"]
    assert found.resolve("theirs", "method.name") is DPFedAvg
    assert found.name_of(DPFedAvg()) == "theirs"
    with pytest.raises(UserError, match="Known: theirs"):
        found.resolve("x", "method.name")


def test_every_method_has_a_strategy_a_row_in_the_readme_and_a_place_in_the_default_policy(tmp_path: Path) -> None:
    kinds = (getattr(strategies, name) for name in strategies.__all__)
    named = {kind.method_name for kind in kinds if hasattr(kind, "method_name")}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert readme.split("## Methods\n\n")[1].split("\n\n")[0] == methods_table(), "python -m fedpriv.cli.catalogue"
    # An app's updates are not gradients of examples, which are all that four of them compute with, and only the app
    # itself could change its local steps for dp-scaffold and fedspeed.
    assert named == set(METHODS) - {
        "dp-gd",
        "diff2",
        "private-spiderboost",
        "dice-sgd",
        "dp-scaffold",
        "fedspeed",
        "private-iht",
    }
    assert set(METHODS) == {row.split("`")[1] for row in methods_table().splitlines()[2:]}
    assert write_default_policy(tmp_path)
    assert set(load_policy(tmp_path / POLICY_FILE).accepts.methods) == set(METHODS)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no.such.module:Method", "a class that can be imported, got 'no.such.module:Method'"),
        ("fedpriv.methods.clip21:Clip22", "a class that can be imported"),
        ("./missing.py:Method", "a class that can be imported"),
        ("fedpriv.errors:nearest", "a dataclass that is a method"),
        ("fedpriv.vectors:Layout.nothing", "a class that can be imported"),
        (":", "a class that can be imported"),
        ("clip-21", "Did you mean 'clip21'"),
        (7, "a known name, got 7"),
        (["clip21"], "a known name"),
    ],
)
def test_what_leads_nowhere_is_one_line(name: object, said: str) -> None:
    with pytest.raises(UserError, match="expected") as caught:
        METHODS.resolve(name, "method.name")
    assert said in str(caught.value)


OFFERING = """
from fedpriv.methods import DPFedAvg
import fedpriv
class Mine(DPFedAvg): pass
class _Hidden(DPFedAvg): pass
def make(): pass
NUMBER = 3
"""


def test_a_name_that_a_module_lacks_gets_its_public_classes_and_functions(tmp_path: Path) -> None:
    def said(name: str) -> str:
        with pytest.raises(UserError, match="which the module does not have") as caught:
            SERVER_OPTIMIZERS.resolve(name, "server.optimizer")
        return str(caught.value).partition("does not have. ")[2]

    (tmp_path / "own.py").write_text(OFFERING)
    assert said(f"{tmp_path}/own.py:Nothing") == "Known: Mine, make."
    assert said(f"{tmp_path}/own.py:Min") == "Did you mean 'Mine'? Known: Mine, make."
    (tmp_path / "listed.py").write_text(OFFERING + "__all__ = ['Mine', 'NUMBER', 'fedpriv', 'Later']")
    assert said(f"{tmp_path}/listed.py:Nothing") == "Known: Later, Mine."
    assert said("torch.optim:Nadam").startswith("Did you mean 'NAdam'? Known: ASGD, Adadelta, ")
    assert said("fedpriv.methods:DPFedAv").startswith("Did you mean 'DPFedAvg'?")
    assert len(said("torch:NoSuch")) < 300


def test_a_module_that_fails_to_import_a_part_on_first_use_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text("def __getattr__(name):\n    raise ImportError('no package tensorwhat')\n")
    with pytest.raises(UserError, match=r"got '.*late\.py:Part' \(ImportError: no package tensorwhat\)"):
        METHODS.resolve(f"{tmp_path}/late.py:Part", "method.name")


@pytest.mark.usefixtures("config")
def test_an_order_of_a_server_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's policy may name a class of its owner; a server can then name this class, and no other."""
    stranger, own = f"{tmp_path / 'stranger.py'}:Method", f"{tmp_path / 'own.py'}:HalfClip"
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')\n")
    with pytest.raises(UserError, match="a known name"):
        METHODS.known(stranger, "method")
    with pytest.raises(UserError, match="a known name"):
        METHODS.known("os:system", "method")
    monkeypatch.setattr(METHODS, "_referred", {})
    with pytest.raises(UserError, match="a known name"):
        METHODS.known(own, "method")
    policy = tmp_path / "policy.toml"
    policy.write_text(f'[accepts]\nmethods = ["{own}"]\n[limits]\nepsilon = 1.0\ndelta = 1e-5\n')
    assert load_policy(policy).accepts.methods == (own,)
    assert METHODS.known(own, "method").__name__ == "HalfClip"


@pytest.mark.usefixtures("config")
def test_a_servers_copy_of_a_file_leads_to_the_class_of_the_devices_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy names its file by the path from its folder, like a config."""
    monkeypatch.setattr(METHODS, "_referred", {})
    policy = tmp_path / "policy.toml"
    policy.write_text('[accepts]\nmethods = ["./own.py:HalfClip"]\n[limits]\nepsilon = 1.0\ndelta = 1e-5\n')
    assert load_policy(policy).accepts.methods == (f"{tmp_path / 'own.py'}:HalfClip",)
    found = METHODS.known("/of/the/server/own.py:HalfClip", "method")
    assert METHODS.name_of(found()) == f"{tmp_path / 'own.py'}:HalfClip"
    for other in ("/of/the/server/own.py:Line", "/of/the/server/other.py:HalfClip", "own:HalfClip"):
        with pytest.raises(UserError, match="a known name"):
            METHODS.known(other, "method")


def test_a_class_that_lacks_what_its_kind_has_is_refused_by_name(tmp_path: Path) -> None:
    """Otherwise it would be noticed in the middle of a run."""
    path = tmp_path / "half.py"
    path.write_text(
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Half:\n    server_lr: float\n"
        "    def batches(self, examples, rng): ...\n"
    )
    with pytest.raises(UserError, match=r"^method\.name: expected a method with bounded, .*, step_prox, got"):
        METHODS.resolve(f"{path}:Half", "method.name")
    with pytest.raises(UserError, match="with batch_size, client_lr, signal, walked, got"):
        LOCAL_WORKS.resolve(f"{path}:Half", "local.work")
    with pytest.raises(UserError, match="with build, dense, parameters, got"):
        MODELS.resolve(f"{path}:Half", "model.name")


@pytest.mark.parametrize(
    "registry", [METHODS, MODELS, DATASETS, PARTITIONS, LOCAL_WORKS, SERVER_OPTIMIZERS, SHIFTS, TASKS]
)
def test_fedprivs_own_classes_have_what_is_asked_of_others(registry: Registry[Any]) -> None:
    for kind in registry.values():
        assert registry.resolve(f"{kind.__module__}:{kind.__name__}", "key") is kind


def test_what_answers_for_its_own_privacy_is_built_in(tmp_path: Path) -> None:
    """A sampling, a schedule or a trust from a plug-in could claim any epsilon."""
    (tmp_path / "mine.py").write_text(OWN)
    for registry in (SAMPLINGS, SCHEDULES, TRUSTS):
        with pytest.raises(UserError, match="a known name"):
            registry.resolve(f"{tmp_path / 'mine.py'}:HalfClip", "key")


def test_a_file_that_fails_is_loaded_again_once_it_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_at_all\n")
    with pytest.raises(UserError, match="no_such_module_at_all"):
        METHODS.resolve(f"{path}:HalfClip", "method.name")
    path.write_text(OWN)
    kind = METHODS.resolve(f"{path}:HalfClip", "method.name")
    assert kind().client_part.client_rule  # type: ignore[attr-defined]
    assert torch.equal(kind().init_server(torch.ones(2)).model, torch.ones(2))
