"""Mistakes of users who know the documentation alone: each is one line that names the right fix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.sweep_files import BASE, sweep_file
from torch import nn

import fedpriv
from fedpriv.cli import main
from fedpriv.errors import UserError
from fedpriv.experiment import execution as engines
from fedpriv.experiment.build import assemble
from fedpriv.experiment.execution import Execution, start_engine
from fedpriv.methods import DPFedAvg
from fedpriv.plugins import own_frames

METHOD = """
from dataclasses import dataclass
from fedpriv.bounding import Clip
from fedpriv.methods.memoryless import Memoryless

@dataclass(frozen=True, kw_only=True)
class Mistaken(Memoryless):
    server_lr: float = 1.0

    @property
    def bounded(self) -> Clip:
        return Clip(clipnorm=0.5)
"""

NET = """
from torch import nn

def lazy(input_shape: tuple[int, ...], classes: int):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))
"""

FRAME = pd.DataFrame({"age": [0.3, 0.6] * 6, "ill": [0, 1] * 6, "hospital": ["a", "a", "b"] * 4})

BARE: dict[str, Any] = {"client": None, "label": None}


def line_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error of a command, which is a line beginning with fedpriv: after any frames of the user's code."""
    with pytest.raises(SystemExit) as ended:
        main([str(part) for part in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.rstrip().split("\n")[-1].removeprefix("fedpriv: ")


def config_in(folder: Path, text: str = BASE) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def experiment(**changes: Any) -> fedpriv.Experiment:
    parts: dict[str, Any] = {"model": nn.Linear(1, 2), "data": FRAME, "client": "hospital", "label": "ill"}
    return fedpriv.Experiment(**{**parts, "method": DPFedAvg(clip_norm=1.0), "rounds": 1, **changes})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of no rounds."""
    (tmp_path / "configs").mkdir()
    config = fedpriv.load_config(config_in(tmp_path / "configs"), ["training.rounds=0"])
    fedpriv.run_experiment(config, tmp_path / "runs" / "one", engine="loop")
    return tmp_path / "runs" / "one"


def test_an_own_method_with_a_mistake_is_named_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mistaken.py").write_text(METHOD)
    config = config_in(tmp_path, BASE.replace('"dp-fedavg"\nclip_norm = 1.0', '"./mistaken.py:Mistaken"'))
    line = line_of(capsys, "check", config)
    assert line.startswith(f"{tmp_path / 'mistaken.py'}, line 12: expected code that runs, got TypeError: Clip.")
    assert own_frames(ValueError("not raised in a file that a config names")) == []


def test_layers_without_sizes_are_refused_with_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(NET)
    config = config_in(tmp_path, BASE.replace('"softmax"', '"./net.py:lazy"'))
    assert "got LazyLinear, which makes its weight in the first call. Give 1 its size" in line_of(
        capsys, "check", config
    )
    with pytest.raises(UserError, match="model: expected a model with all its parameters, got LazyLinear"):
        experiment(model=nn.LazyLinear(2)).plan()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("./net.py", 'Add the name in the file, such as "./net.py:NAME"'),
        ("./absent.py:Net", "and there is no such file. Correct the path"),
    ],
)
def test_a_reference_without_a_name_or_a_file_says_which(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, wanted: str
) -> None:
    assert wanted in line_of(capsys, "check", config_in(tmp_path, BASE.replace("softmax", name)))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rounds": "2"}, "training.rounds: expected a whole number from 0 to 1,000,000,000, got '2'"),
        ({"evaluate_every": "1"}, "training.evaluate_every: expected at least 1, got '1'"),
        ({"seed": "1"}, "seed: expected a whole number, got '1'"),
        ({"name": 3}, "name: expected a text, got 3"),
        ({"client": None, "inputs": ["age"]}, "clients: expected a number of clients, got data that name no clients"),
        ({"model": nn.Linear}, "model: expected a torch module, got the class Linear"),
        ({"data": [], "client": None, "label": None}, "data: expected a list of clients, .* got an empty one"),
        ({"data": FRAME.iloc[:0]}, "expected inputs with at least one row"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"name": "a/b"}, "name: expected a short name that can be a folder's, got 'a/b'"),
        (
            {"data": [(torch.tensor(1.0), torch.tensor(1))], **BARE},
            "data of client 0: expected an array with one row for each",
        ),
        (
            {"data": [(["a", "b"], [0, 1])], **BARE},
            "data of client 0: expected numbers in dense arrays, got too many dimensions",
        ),
        (
            {"data": [(torch.eye(2).to_sparse(), [0, 1])], **BARE},
            "data of client 0: expected numbers in dense arrays, got can't",
        ),
        ({"data": [([0.1, 0.2], [0, 1])], **BARE}, r"expected inputs \[examples, \*shape\], got shape \(2,\)"),
        ({"data": {"train": FRAME, "tst": FRAME}}, "data: expected parts 'train' and 'test', got 'tst'"),
    ],
)
def test_arguments_of_a_wrong_kind_are_one_line(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        assert experiment(**changes).config


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (lambda: DPFedAvg(clip_norm="1"), "method.clip_norm: expected a positive number, got '1'"),  # type: ignore[arg-type]
        (lambda: DPFedAvg(server_lr=[1.0]), r"method.server_lr: expected a positive number, got \[1.0\]"),  # type: ignore[arg-type]
        (
            lambda: experiment(privacy=fedpriv.Privacy(epsilon="8")).plan(),  # type: ignore[arg-type]
            "privacy.epsilon: expected a finite number above 0 .*, got '8'",
        ),
    ],
)
def test_numbers_given_as_texts_are_shown_as_texts(made: Callable[[], object], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        made()


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        (np.ones(20, np.float32), "dataset x.npy: expected inputs [examples, *shape], got shape (20,)."),
        (np.float32(3.0), "dataset x.npy: expected inputs with at least one row, got shape ()."),
        (np.full((20, 2), 1e300), "x.npy: expected finite numbers, got NaN or infinity in row "),
    ],
)
def test_arrays_of_a_wrong_shape_or_size_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inputs: np.ndarray, wanted: str
) -> None:
    np.save(tmp_path / "x.npy", inputs)
    np.save(tmp_path / "y.npy", np.arange(20) % 2)
    data = 'name = "npy"\ninputs = "x.npy"\nlabels = "y.npy"\npartition = "iid"\nclients = 2\n'
    tables = BASE.split("[data]")[0] + f"[data]\n{data}\n[model]" + BASE.split("[model]")[1]
    assert wanted in line_of(capsys, "check", config_in(tmp_path, tables), "--data-root", tmp_path)


def test_inputs_that_need_gradients_are_accepted() -> None:
    clients = [(torch.rand(3, 1, requires_grad=True), torch.tensor([0, 1, 1]))] * 2
    assert len(experiment(data=clients, client=None, label=None).config.data.dataset.load(None).train_inputs) > 0


def test_tables_of_numbers_are_described_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key, wanted in (
        ("categories = {sex = 'f'}", "data.categories: expected a table, each value a list, each a quoted string, got"),
        ("numeric = {age = [4, 1]}\nfill = {sex = 'f'}", "data.fill: expected columns of data.numeric, got sex. "),
        ("numeric = {age = 3}", "data.numeric: expected a table, each value a list of 2, each a number, got"),
    ):
        data = f'[data]\nname = "csv"\nfile = "x.csv"\ntarget = "y"\n{key}\n[model]'
        tables = BASE.split("[data]")[0] + data + BASE.split("[model]")[1]
        assert wanted in line_of(capsys, "check", config_in(tmp_path, tables))


def test_a_list_of_clients_may_come_with_public_test_examples() -> None:
    clients = [(torch.rand(3, 1), torch.tensor([0, 1, 1])) for _ in range(4)]
    test = (torch.rand(5, 1), torch.tensor([0, 1, 0, 1, 0]))
    tables = {"train": [FRAME[["age", "ill"]]] * 2 + [FRAME[["age", "ill"]].iloc[:0]], "test": FRAME}
    for data, options, examples in (
        ({"train": clients, "test": test}, {}, 5),
        ({"train": clients, "test": torch.utils.data.TensorDataset(*test)}, {}, 5),
        (tables, {"label": "ill", "inputs": ["age"]}, 12),
    ):
        made = experiment(**{"data": data, "client": None, "label": None, **options})
        held = made.config.data.dataset.load(None)
        assert len(held.test_inputs) == examples
        assert assemble(made.config).server.sampling.population == len(data["train"])


def test_compare_says_what_a_folder_is(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "got a path without a folder. Create one" in line_of(capsys, "compare", tmp_path / "absent")
    assert f"got a folder of runs. Name its runs, such as {run.parent}/*" in line_of(capsys, "compare", tmp_path)
    assert f"Name its runs, such as {run.parent}/*" in line_of(capsys, "compare", run.parent)
    (empty := tmp_path / "empty").mkdir()
    assert "got a folder without runs" in line_of(capsys, "compare", empty)
    (run / "summary.json").unlink()
    assert "got an unfinished one. Finish it" in line_of(capsys, "compare", run)
    (run / "analysis.json").write_text("{}")
    line = line_of(capsys, "compare", run)
    assert "expected a run that trains a model, got an analysis. Print its answers with fedpriv analyze" in line
    (several := tmp_path / "words" / "level-1").mkdir(parents=True)
    assert "got an analysis" in line_of(capsys, "compare", several.parent)
    with pytest.raises(UserError, match="got a path without a folder"):
        fedpriv.load_model(tmp_path / "absent")


def test_compare_shows_a_promise_once(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = fedpriv.load_config(
        tmp_path / "configs" / "config.toml",
        ["training.rounds=0", "privacy.epsilon=3", "privacy.trust=central", "privacy.delta=1e-5"],
    )
    fedpriv.run_experiment(config, tmp_path / "private", engine="loop")
    with pytest.raises(SystemExit):
        main(["compare", str(run), str(tmp_path / "private"), "--csv"])
    shown = capsys.readouterr().out
    assert "trust" in shown
    assert "privacy.trust" not in shown
    assert "privacy.delta" not in shown


def test_report_says_what_a_path_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a folder with runs, got a path without a folder" in line_of(capsys, "report", tmp_path / "absent")
    assert "expected a folder with runs, got a file" in line_of(capsys, "report", config_in(tmp_path))
    (empty := tmp_path / "empty").mkdir()
    assert "got a folder without runs" in line_of(capsys, "report", empty)


def test_a_refused_sweep_leaves_no_trials_and_keeps_out_of_runs(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    unknown = sweep_file(tmp_path, '[[axis]]\nkey = "methd"\nvalues = [1]\n')
    assert "Did you mean 'method'?" in line_of(capsys, "sweep", unknown, "--out", out)
    assert not (out / "trials").exists()
    empty = sweep_file(tmp_path, '[[axis]]\nkey = "seed"\nvalues = []\n')
    assert "got an empty list. Write values = [...]" in line_of(capsys, "sweep", empty, "--out", out)
    grid = sweep_file(tmp_path, '[[axis]]\nkey = "seed"\nvalues = [1]\n')
    assert "expected a folder for a sweep, got the folder of a run" in line_of(capsys, "sweep", grid, "--out", run)
    (out / "trials").mkdir(parents=True)
    assert "got a folder with one" in line_of(capsys, "run", tmp_path / "configs" / "config.toml", "--out", out)


def test_commands_name_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asking = config_in(tmp_path, f'{BASE.partition("[model]")[0]}[analysis.labels]\nkind = "labels"\n')
    assert "expected a sweep, got an analysis. Use fedpriv analyze" in line_of(capsys, "sweep", asking)
    assert line_of(capsys, "chekc", asking) == "No such command 'chekc'. Did you mean 'check'?"
    words = config_in(tmp_path, asking.read_text().replace('"labels"', '"heavy-hitters"'))
    assert "expected a kind that one round answers, got 'heavy-hitters'" in line_of(capsys, "run", words)


def test_check_names_the_data_root_in_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(config_in(tmp_path)), "--data-root", str(tmp_path)])
    assert ended.value.code == 0
    assert capsys.readouterr().out.rstrip().endswith(f"--data-root {tmp_path}")


def test_a_new_experiment_may_be_given_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["new", "mine.toml"])
    assert fedpriv.load_config(tmp_path / "mine.toml").name == "mine"


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Some editors on Windows write one."""
    path = tmp_path / "own.toml"
    path.write_text(BASE, encoding="utf-8-sig")
    assert fedpriv.load_config(path).name == fedpriv.load_config(config_in(tmp_path, BASE)).name


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("name=" + 300 * "a", "name: expected a name of at most 200 bytes, got 300 characters."),
        ('name=" "', "name: expected a short name that can be a folder's, got ' '."),
        ("data.name=", "data.name: expected a known name, got a missing key. Known: "),
    ],
)
def test_names_that_cannot_be_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, wanted: str
) -> None:
    assert wanted in line_of(capsys, "check", config_in(tmp_path, BASE), "-s", setting)


@pytest.mark.parametrize("command", ["run", "sweep", "audit", "analyze"])
@pytest.mark.parametrize("given", [["--out", ""], ["--out="], ["--data-root", ""]])
def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    given: list[str],
) -> None:
    """As with an unset variable of a shell."""
    config = config_in(tmp_path, BASE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    wanted = f"{given[0].rstrip('=')}: expected a path, got an empty text."
    assert line_of(capsys, command, config, *given).startswith(wanted)
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    ("name", "file", "wanted"),
    [
        ("csv", ".", "expected a CSV file, got a folder"),
        ("csv", "empty", "expected a CSV file, got an empty file"),
        ("npz", "text", "got a file with objects, or of another kind"),
    ],
)
def test_files_of_another_kind_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str, wanted: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("a,b\n1,2\n")
    (tmp_path / "objects.npz").write_bytes(np.array([{}]).dumps())
    keys = f'name = "{name}"\nfile = "{file}"' + ('\ntarget = "b"\nnumeric = {a = [0, 1]}' if name == "csv" else "")
    config = config_in(tmp_path, BASE.replace('name = "digits"', keys))
    assert wanted in line_of(capsys, "check", config, "--data-root", tmp_path)


@pytest.mark.parametrize("where", ["model.name", "workers.py: build"])
def test_auto_hides_no_error_but_those_of_starting_ray(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise UserError(where, "a model that can be made", "RuntimeError", "Correct it")

    monkeypatch.setattr(engines, "_workers_pay", lambda *_: True)
    monkeypatch.setattr(engines, "_ray", failing)
    built = assemble(fedpriv.load_config(config_in(tmp_path)))
    with pytest.raises(UserError, match="a model that can be made"):
        start_engine(built, Execution())


def test_public_names_alone_are_offered() -> None:
    assert fedpriv.Execution is Execution
    assert {"Experiment", "Execution", "load_results"} <= set(dir(fedpriv))
    assert not {"Any", "TYPE_CHECKING", "import_module", "require_extra"} & set(dir(fedpriv))
