"""Own models, data and methods: a class or a function in a file, named by the config."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fedpriv import load_config
from fedpriv.cli import main
from fedpriv.data.own import dataset_of
from fedpriv.errors import UserError
from fedpriv.experiment.build import build_module, count_parameters, make_federation
from fedpriv.experiment.execution import Execution
from fedpriv.experiment.run import run_experiment
from fedpriv.methods.base import feedback_of
from fedpriv.sweeps.config import load_sweep
from fedpriv.tasks.task import Task
from fedpriv.vectors import trainable

NET = """
from collections.abc import Callable

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int = 8, frozen: bool = False):
        super().__init__()
        self.first = nn.Linear(torch.Size(input_shape).numel(), width)
        self.second = nn.Linear(width, classes)
        self.register_buffer("scale", torch.tensor(2.0))
        self.first.requires_grad_(not frozen)

    def forward(self, inputs):
        return self.second(torch.tanh(self.scale * self.first(inputs.flatten(1))))


def tied(input_shape: tuple[int, ...], classes: int, layers: int = 2):
    inner = nn.Linear(5, 5)
    return nn.Sequential(*(inner for _ in range(layers)), nn.Linear(5, classes))


def normed(input_shape, classes):
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))


def frozen_norm(input_shape, classes):
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4).eval().requires_grad_(False), nn.Linear(4, classes))


def dropped(classes):
    return nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, classes))


def wide(classes):
    return nn.Linear(5, classes + 1)


def fails(classes, at: str = "build"):
    if at == "build":
        raise KeyError("weights")
    class Broken(nn.Linear):
        def forward(self, inputs):
            raise RuntimeError("shapes differ")
    return Broken(5, classes)


def nothing(classes):
    return None


class Rooted(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs.sqrt())


def rooted(classes):
    return Rooted(5, classes)


def frozen(classes):
    return nn.Linear(5, classes).requires_grad_(False)


def half(classes):
    return nn.Sequential(nn.Linear(5, classes), nn.Linear(classes, classes).double())


def untyped(classes, width):
    return nn.Linear(5, classes)


def named(classes, name: str):
    return nn.Linear(5, classes)


def odd(classes, how: nn.Module = None):
    return nn.Linear(5, classes)


def called(classes, how: Callable[[int], int] = abs):
    return nn.Linear(5, classes)


values = 3
"""

DATA = """
import numpy as np


def load(rows: int = 120, people: int = 6):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(rows, 5))
    labels = inputs[:, :3].argmax(1)
    who = [f"user-{i % people}" for i in range(rows)]
    tests = rng.normal(size=(30, 5))
    return dict(inputs=inputs, labels=labels, client_ids=who, test_inputs=tests, test_labels=tests[:, :3].argmax(1))


def fails():
    return open("/nowhere/table.csv")


def number():
    return 3


def taken(clients: int = 3):
    return load()
"""

METHOD = """
from dataclasses import dataclass

from fedpriv.bounding import Clip
from fedpriv.methods.memoryless import Memoryless


@dataclass(frozen=True, kw_only=True)
class Half(Memoryless):
    server_lr: float = 1.0

    @property
    def bounded(self) -> Clip:
        return Clip(clip_norm=0.5)
"""

EXPERIMENT = """
name = "own"
seed = 3
[data]
name = "./data.py:load"
partition = "natural"
[model]
name = "./net.py:Net"
[method]
name = "./method.py:Half"
[privacy]
noise_multiplier = 1.0
[training]
rounds = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of a user, and an experiment that names them."""
    for name, text in (("net.py", NET), ("data.py", DATA), ("method.py", METHOD), ("own.toml", EXPERIMENT)):
        (tmp_path / name).write_text(text)
    return tmp_path


def module_of(folder: Path, *settings: str) -> nn.Module:
    config = load_config(folder / "own.toml", settings)
    return build_module(config, (5,), 3, 0)


def test_own_classes_run_alike_in_every_engine_in_process(folder):
    config = load_config(folder / "own.toml", ["model.width=4"])
    for engine in ("loop", "vectorized"):
        run_experiment(config, folder / engine, engine=engine, execution=Execution(client_noise="faithful"))
    models = [load_file(folder / engine / "model.safetensors") for engine in ("loop", "vectorized")]
    assert sorted(models[0]) == sorted(models[1])
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert "public or the server's own" in (folder / "loop" / "privacy.txt").read_text()


def test_clients_are_those_that_the_function_names(folder):
    federation = make_federation(load_config(folder / "own.toml", ["data.people=5"]))
    assert federation.population == 5
    assert federation.dataset.classes == 3


def test_the_place_of_the_files_does_not_matter_and_their_content_does(folder, tmp_path_factory):
    config = load_config(folder / "own.toml")
    moved = tmp_path_factory.mktemp("moved")
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert load_config(moved / "own.toml").digest == config.digest
    assert load_config(moved / "own.toml").noise_id == config.noise_id
    changed = tmp_path_factory.mktemp("changed")
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes() + b"\n")
    other = load_config(changed / "own.toml")
    assert other.digest != config.digest
    assert other.noise_id != config.noise_id


def test_a_runs_own_config_runs_again_but_not_with_another_source(folder):
    run_experiment(load_config(folder / "own.toml"), folder / "out")
    recorded = folder / "out" / "config.toml"
    assert load_config(recorded).digest == load_config(folder / "own.toml").digest
    # A process reads a file once: another process would see this content.
    recorded.write_text(recorded.read_text().replace('sha256 = "', 'sha256 = "0'))
    with pytest.raises(UserError, match=r'^sources\."(data|model|method)\.name": expected the source'):
        load_config(recorded)
    assert load_config(recorded, ["sources="]).digest == load_config(folder / "own.toml").digest


def test_resuming_with_another_source_is_refused(folder, tmp_path_factory):
    run_experiment(load_config(folder / "own.toml"), folder / "out")
    changed = tmp_path_factory.mktemp("changed")
    for file in folder.glob("*.*"):
        (changed / file.name).write_bytes(file.read_bytes() + (b"\n" if file.name == "net.py" else b""))
    with pytest.raises(UserError, match=r"a different experiment \(sources\.model\.name is"):
        run_experiment(load_config(changed / "own.toml"), folder / "out", resume=True)


def test_what_is_frozen_costs_nothing_and_stays(folder):
    config = load_config(folder / "own.toml", ["model.frozen=true"])
    module = build_module(config, (5,), 3, 0)
    task = Task(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert task.layout.size == count_parameters(config, (5,), 3) == 8 * 3 + 3
    task.gradient(torch.ones(task.layout.size), torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    kept = module.state_dict()
    assert all(torch.equal(kept[name], before[name]) for name in ("first.weight", "first.bias", "scale"))


def test_shared_weights_count_once_and_their_gradient_is_of_all_uses(folder):
    module = module_of(folder, f"model.name={folder / 'net.py'}:tied")
    task = Task(module)
    assert task.layout.size == 30 + 18
    model, inputs, labels = task.initial_model(), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    alone = task.gradient(model, inputs, labels)
    batched = task.gradients(model, inputs[None], labels[None], torch.full((1, 4), 0.25))[0]
    torch.testing.assert_close(alone, batched)
    assert alone[:25].abs().sum() > 0


def test_a_norm_that_is_frozen_in_evaluation_mode_is_taken(folder):
    assert len(trainable(module_of(folder, f"model.name={folder / 'net.py'}:frozen_norm"))) == 4


def test_the_seed_decides_the_first_weights(folder):
    config = load_config(folder / "own.toml")
    state = torch.random.get_rng_state()
    one, same, other = (build_module(config, (5,), 3, seed).state_dict()["first.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("normed", r"^model: expected parameters only, got the buffers 1\.running_mean"),
        ("dropped", r"^model\.name: expected logits that depend on the inputs"),
        ("wide", r"^model\.name: expected logits \[batch, 3\] of the model, got \[2, 4\]"),
        ("fails", r"^model\.name: expected a model that can be made, got KeyError: 'weights' \(.*net\.py, line 4\d\)"),
        ("nothing", r"^model\.name: expected a function that returns a module, got a NoneType"),
        ("frozen", r"^model\.name: expected a module with trainable parameters, got only frozen"),
        ("half", r"^model\.name: expected a model that takes float32 inputs .*RuntimeError"),
    ],
)
def test_a_model_that_cannot_be_trained_is_one_line(folder, name, line):
    with pytest.raises(UserError, match=line):
        Task(module_of(folder, f"model.name={folder / 'net.py'}:{name}"))


def test_an_exception_in_forward_names_the_file_and_the_line(folder):
    with pytest.raises(UserError, match=r"RuntimeError: shapes differ \(.*net\.py, line \d+\)"):
        module_of(folder, f"model.name={folder / 'net.py'}:fails", "model.at=forward")


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("net.py:untyped", r"^model\.name: expected a type for its parameter width, got a missing type"),
        ("net.py:named", r"^model\.name: expected parameters with other names than the keys of \[model\], got name"),
        ("net.py:odd", r"^model\.name: expected a type for its parameter how that a config can hold"),
        ("net.py:called", r"^model\.name: expected a type for its parameter how that a config can hold"),
        ("net.py:values", r"^model\.name: expected a class or a function, got .*net\.py:values', which is a int"),
        (
            "net.py:Nett",
            r"^model\.name: expected a class that can be imported, got .*which the module does not have.*'Net'",
        ),
        ("ends.py:Net", r"^model\.name: expected a class that can be imported, got .*SystemExit"),
        ("absent.py:Net", r"^model\.name: expected a class that can be imported, got .*and there is no such file"),
        ("no_such_package:Net", r"^model\.name: expected a class that can be imported, .*ModuleNotFoundError"),
    ],
)
def test_a_name_that_leads_to_no_model_is_one_line(folder, setting, line):
    (folder / "ends.py").write_text("raise SystemExit(0)")
    place = setting if setting.startswith("no_") else f"{folder}/{setting}"
    with pytest.raises(UserError, match=line):
        load_config(folder / "own.toml", [f"model.name={place}"])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["model.width=wide"], r"^model\.width: expected a whole number, got 'wide'"),
        (["model.depth=3"], r"^model\.depth: expected a known key"),
        (["data.rows=many"], r"^data\.rows: expected a whole number, got 'many'"),
    ],
)
def test_keys_are_read_as_strictly_as_those_of_built_in_classes(folder, settings, line):
    with pytest.raises(UserError, match=line):
        load_config(folder / "own.toml", settings)


def test_a_default_and_the_same_value_written_down_are_one_experiment(folder):
    text = NET.replace("width: int = 8", "width: int = 8, gain: float = 1, parts: tuple[float, float] = (0, 1)")
    (folder / "net.py").write_text(text)
    config = load_config(folder / "own.toml")
    assert config.tables["model"]["gain"] == 1.0
    written = load_config(folder / "own.toml", ["model.gain=1.0", "model.parts=[0.0, 1.0]"])
    assert load_config(config.tables).digest == config.digest == written.digest


def test_a_file_that_cannot_be_run_is_one_line(folder):
    (folder / "broken.py").write_text("import torch\nwidth = unknown\n")
    with pytest.raises(UserError, match=r"NameError: name 'unknown' is not defined") as caught:
        load_config(folder / "own.toml", [f"model.name={folder / 'broken.py'}:Net"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fails", r"^data\.name: expected a function that returns data, got FileNotFoundError: .*data\.py, line 15\)"),
        ("number", r"^data\.name: expected a function that returns a mapping of arrays, got a int"),
    ],
)
def test_a_function_that_returns_no_data_is_one_line(folder, name, line):
    with pytest.raises(UserError, match=line):
        make_federation(load_config(folder / "own.toml", [f"data.name={folder / 'data.py'}:{name}"]))


def test_a_parameter_with_a_reserved_name_is_refused(folder):
    with pytest.raises(UserError, match=r"other names than the keys of \[data\], got clients"):
        load_config(folder / "own.toml", [f"data.name={folder / 'data.py'}:taken"])


def arrays(**changes):
    made = {"inputs": np.arange(20.0).reshape(10, 2), "labels": np.array([0, 1] * 5), "client_ids": list("aabbccddee")}
    return {name: value for name, value in (made | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"inputs": None}, "an array 'inputs'"),
        ({"labels": None}, "an array 'labels'"),
        ({"input": np.ones(3)}, "known arrays, got 'input'"),
        ({"inputs": np.array([["1", "red"]] * 10)}, "inputs that are numbers"),
        ({"inputs": np.array([[1.0, 2.0]] * 9 + [[np.nan, 1.0]])}, "NaN or infinity in row 9"),
        ({"inputs": [[1.0, 2.0], [1.0]]}, "inputs of one shape"),
        ({"inputs": np.zeros((0, 2))}, "at least one row"),
        ({"labels": np.array(["yes", "no"] * 5)}, "labels that are whole numbers from 0"),
        ({"labels": np.array([0, 1, -1] + [0] * 7)}, "row 2: -1"),
        ({"labels": np.array([0, 1, 0.5] + [0] * 7)}, "row 2: 0.5"),
        ({"labels": np.array([0, 1])}, "labels for 10 examples, got 2"),
        ({"client_ids": ["a"] * 3}, "client_ids for 10 examples, got 3"),
        ({"client_ids": ["a"] * 9 + [None]}, "row 9: None"),
        ({"client_ids": np.arange(10) / 3}, "whole numbers or texts"),
        ({"test_inputs": np.ones((2, 2))}, "both test_inputs and test_labels"),
        ({"classes": 1, "test_inputs": np.ones((2, 2)), "test_labels": [0, 1]}, "classes of at least 2"),
    ],
)
def test_arrays_that_are_no_data_set_are_one_line(changes, line):
    with pytest.raises(UserError, match=line) as caught:
        dataset_of(arrays(**changes), "mine")
    assert "\n" not in str(caught.value)


def test_without_test_arrays_some_of_each_clients_own_examples_are_held_out():
    made = dataset_of(
        arrays(inputs=np.arange(200.0).reshape(100, 2), labels=[0, 1] * 50, client_ids=[7] * 60 + [3] * 40), "m"
    )
    assert made.natural_population == 2
    assert made.test_groups is not None
    assert made.groups is not None
    assert np.bincount(made.test_groups).tolist() == pytest.approx([8, 12], abs=1)
    assert len(made.train_labels) + len(made.test_labels) == 100


def test_test_arrays_are_public_and_torch_tensors_are_taken():
    given = arrays(
        inputs=torch.ones(10, 1, 4, 4), test_inputs=torch.zeros(2, 1, 4, 4), test_labels=torch.tensor([[0], [2]])
    )
    made = dataset_of(given, "mine")
    assert (made.test_groups, made.classes, made.input_shape) == (None, 3, (1, 4, 4))


def test_check_says_what_an_experiment_consists_of_and_writes_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["check", str(folder / "own.toml"), "-s", "model.width=4"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "120 examples to train on, 30 to test on; inputs 5" in shown
    assert "clients     6, 20 examples each; 3 labels" in shown
    assert "model       39 trainable parameters, first loss" in shown
    assert re.search(r"^signal      of norm \d\S*, computed by one client$", shown, re.MULTILINE)
    assert "source      model.name: module net.py, sha256 " in shown
    assert shown.splitlines()[-1] == f"next        fedpriv run {folder / 'own.toml'} -s model.width=4"
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in str(path)] == before


def test_check_warns_of_a_delta_that_would_allow_to_release_a_clients_data(folder, capsys):
    with pytest.raises(SystemExit):
        main(["check", str(folder / "own.toml"), "-s", "privacy.delta=0.2"])
    shown = capsys.readouterr().err
    assert "warning     delta is at least 1 / clients (0.17): such a delta would also allow one client's data" in shown


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ("inputs * 1e300", "fedpriv: dataset load: expected finite float32 inputs, got NaN or infinity in row 0."),
        ("inputs * np.nan", "fedpriv: dataset load: expected finite float32 inputs, got NaN or infinity in row 0."),
        ("inputs[:, :3]", "fedpriv: dataset load: expected equal shapes of training and test inputs"),
    ],
)
def test_check_finds_data_that_would_fail_later(folder, capsys, data, line):
    (folder / "other.py").write_text(DATA.replace("inputs=inputs", f"inputs={data}"))
    assert checked(folder, capsys, f"data.name={folder / 'other.py'}:load").startswith(line)


@pytest.mark.parametrize(("name", "trust"), [("Long", "central"), ("Silent", "local"), ("Bare", "local")])
def test_check_finds_a_method_that_breaks_its_promise(folder, capsys, name, trust):
    (folder / "method.py").write_text(METHOD + BREAKS)
    said = checked(folder, capsys, f"method.name={folder}/method.py:{name}", f"privacy.trust={trust}")
    assert said.startswith("fedpriv: method.name: expected ")


def test_check_finds_a_model_whose_loss_is_not_finite(folder, capsys):
    line = "fedpriv: [model]: expected a finite loss of the first model on test examples, got nan."
    assert checked(folder, capsys, f"model.name={folder / 'net.py'}:rooted").startswith(line)


def checked(folder, capsys, *settings):
    """Return the one line with which `fedpriv check` refuses an experiment."""
    with pytest.raises(SystemExit) as caught:
        main(["check", str(folder / "own.toml"), *(part for setting in settings for part in ("-s", setting))])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_the_file_counts_though_a_name_in_it_leads_to_another_modules_function(folder):
    text = (
        "import functools\nfrom torch import nn\n\nNet = functools.partial(nn.Sequential, nn.Linear(5, 3, bias={}))\n"
    )
    found = []
    for bias in (True, False):
        (folder / "net.py").write_text(text.format(bias))
        found.append(load_config(folder / "own.toml"))
    assert found[0].noise_id != found[1].noise_id
    assert found[0].sources["model.name"]["module"] == "net.py"
    assert found[0].sources["model.name"]["called_module"] == "torch.nn.modules.container"


def test_a_file_that_is_edited_is_loaded_again_and_old_experiments_keep_their_source(folder):
    before = load_config(folder / "own.toml")
    (folder / "data.py").write_text(DATA.replace("rows: int = 120", "rows: int = 180"))
    (folder / "method.py").write_text(METHOD.replace("clip_norm=0.5", "clip_norm=0.7"))
    after = load_config(folder / "own.toml")
    assert (before.tables["data"]["rows"], after.tables["data"]["rows"]) == (120, 180)
    assert (before.method.bounded.l2_bound, after.method.bounded.l2_bound) == (0.5, 0.7)
    assert before.sources["data.name"]["sha256"] != after.sources["data.name"]["sha256"]
    assert before.tables["method"] == after.tables["method"]


@pytest.mark.parametrize("name", ["source", "reference", "natural", "load", "called", "named_in"])
def test_a_parameter_does_not_stand_in_place_of_what_a_data_set_says_of_itself(folder, name):
    (folder / "data.py").write_text(f"def load({name}: str = 'a'): ...\n")
    with pytest.raises(UserError, match=f"^data.name: expected parameters with other names .* got {name}"):
        load_config(folder / "own.toml")


@pytest.mark.parametrize(
    ("parameter", "line"),
    [
        ("x: bytes = b''", "a default of its parameter x that a config can hold, got a bytes"),
        ("x: 'A B' = 3", "parameters with types, got SyntaxError"),
    ],
)
def test_a_parameter_that_no_config_can_hold_is_one_line(folder, parameter, line):
    (folder / "data.py").write_text(f"def load({parameter}): ...\n")
    with pytest.raises(UserError, match=f"^data.name: expected {line}"):
        load_config(folder / "own.toml")


KEEPS = """
from torch import nn


class Keeps(nn.Linear):
    seen = 0.0

    def forward(self, inputs):
        kept, self.seen = self.seen, self.seen + inputs.sum()
        return super().forward(inputs) + kept


def keeps(classes):
    return Keeps(5, classes)
"""


def test_a_model_that_keeps_something_of_its_inputs_is_refused(folder):
    (folder / "net.py").write_text(KEEPS)
    with pytest.raises(UserError, match=r"^model\.name: expected logits that follow from the inputs alone"):
        module_of(folder, f"model.name={folder}/net.py:keeps")


BREAKS = """
from dataclasses import dataclass

from fedpriv.feedback import sent_message


@dataclass(frozen=True, kw_only=True)
class Long(Half):
    def client_rule(self, state, signal, release, round):
        return sent_message(4.0 * self.bounded(signal), release), state


@dataclass(frozen=True, kw_only=True)
class Slightly(Half):
    def client_rule(self, state, signal, release, round):
        unit = signal / signal.norm(dim=-1, keepdim=True)
        return sent_message(unit * 0.5 * (1.0 + 5e-7), release), state


@dataclass(frozen=True, kw_only=True)
class Silent(Half):
    def client_rule(self, state, signal, release, round):
        return self.bounded(signal), state


@dataclass(frozen=True, kw_only=True)
class Bare(Half):
    def client_rule(self, state, signal, release, round):
        message = self.bounded(signal)
        if release is not None:
            release(message)
        return message, state
"""


def test_figures_with_another_bound_than_the_methods_are_not_followed(folder):
    other = (
        METHOD
        + """
    @property
    def feedback(self):
        return Feedback(bounded=Clip(clip_norm=self.bound), beta=None)

    bound: float = 0.5
"""
    )
    (folder / "method.py").write_text(
        other.replace("\n\n@data", "\nfrom fedpriv.feedback import Feedback\n\n\n@data", 1)
    )
    assert feedback_of(load_config(folder / "own.toml").method) is not None
    assert feedback_of(load_config(folder / "own.toml", ["method.bound=4.0"]).method) is None


@pytest.mark.parametrize("trust", ["central", "local"])
@pytest.mark.parametrize("engine", ["loop", "vectorized"])
@pytest.mark.parametrize("name", ["Long", "Slightly"])
def test_a_method_is_held_to_the_bound_on_which_its_noise_depends(folder, engine, trust, name):
    (folder / "method.py").write_text(METHOD + BREAKS)
    config = load_config(folder / "own.toml", [f"method.name={folder}/method.py:{name}", f"privacy.trust={trust}"])
    with pytest.raises(UserError, match=r"^method\.name: expected messages of norm at most 0\.5, its l2_bound"):
        run_experiment(config, folder / "out", engine=engine)
    assert not (folder / "out" / "model.safetensors").exists()


def test_a_method_that_leaves_the_noise_out_is_refused(folder):
    (folder / "method.py").write_text(METHOD + BREAKS)
    config = load_config(folder / "own.toml", [f"method.name={folder}/method.py:Silent", "privacy.trust=local"])
    with pytest.raises(UserError, match=r"^method\.name: expected a client rule that calls release once, got 0 calls"):
        run_experiment(config, folder / "out", engine="loop", execution=Execution(client_noise="faithful"))


def test_a_method_that_sends_its_message_without_the_noise_that_it_drew_is_refused(folder):
    (folder / "method.py").write_text(METHOD + BREAKS)
    config = load_config(folder / "own.toml", [f"method.name={folder}/method.py:Bare", "privacy.trust=local"])
    with pytest.raises(UserError, match=r"^method\.name: expected a client rule that sends its released message"):
        run_experiment(config, folder / "out", engine="loop", execution=Execution(client_noise="faithful"))


@pytest.mark.parametrize(
    "ids",
    [["1", "1.0"], ["\u00e9", "e\u0301"], ["a", "a "]],
)
def test_one_client_under_two_names_is_refused(ids):
    with pytest.raises(UserError, match="expected clients with different ids"):
        dataset_of(arrays(client_ids=[ids[row % 2] for row in range(len(arrays()["labels"]))]), "mine")


@pytest.mark.parametrize("clients", [[None, None], [[1], [1, 2]], 6, [0.0, 1.0]])
def test_a_list_of_clients_that_is_none_is_one_line(clients):
    with pytest.raises(UserError, match=r"^dataset mine: expected clients"):
        dataset_of(arrays(client_ids=[0] * len(arrays()["labels"]), clients=clients), "mine")


def test_tensors_that_numpy_cannot_hold_are_one_line():
    with pytest.raises(UserError, match=r"^dataset mine: expected inputs that numpy can hold"):
        dataset_of(arrays(inputs=torch.zeros(20, 3, dtype=torch.bfloat16)), "mine")


SWEEP = """
name = "sweep"
base = "base/own.toml"
[set]
model.name = "./net.py:Net"
[[axis]]
key = ["data.name", "data.people"]
values = [["./data.py:load", 4], ["./data.py:load", 5]]
"""


def test_files_that_a_sweep_names_are_looked_for_in_its_own_folder(folder, monkeypatch):
    (folder / "base").mkdir()
    for file in ("own.toml", "method.py"):
        (folder / file).rename(folder / "base" / file)
    (folder / "sweep.toml").write_text(SWEEP)
    monkeypatch.chdir("/")
    trials = load_sweep(folder / "sweep.toml").trials()
    assert [trial.config.tables["data"]["people"] for trial in trials] == [4, 5]
    assert trials[0].config.tables["model"]["name"] == f"{folder.resolve()}/net.py:Net"
