"""Data in a user's own files: read as declared, or refused in one line that names the row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fedpriv import load_config
from fedpriv.cli import main
from fedpriv.clock.graphs import read_edges
from fedpriv.clock.profiles import Trace
from fedpriv.data.text.tokens import Texts
from fedpriv.data.text.words import Words
from fedpriv.data.user_files import Csv, ImageFolder, Leaf, Npz, Parquet
from fedpriv.deploy.device.own_data import read_own_data
from fedpriv.errors import UserError
from fedpriv.experiment.build import make_federation
from fedpriv.experiment.config import parse_config

TABLE = """age,job,place,income
40, clerk ,north,low
55,?,south,high
25,smith,north,low
,clerk,south,high
"""

DECLARED: dict[str, Any] = {
    "name": "csv",
    "file": "people.csv",
    "target": "income",
    "client": "place",
    "numeric": {"age": [40, 15]},
    "categories": {"job": ["clerk", "smith"]},
    "labels": ["low", "high"],
    "missing": ["?"],
    "fill": {"age": 40.0},
    "partition": "natural",
    "test": "within",
}


def experiment(**data):
    chosen = {key: value for key, value in (DECLARED | data).items() if value is not None}
    return {
        "name": "own",
        "seed": 1,
        "data": chosen,
        "model": {"name": "softmax"},
        "method": {"name": "dp-fedavg", "clip_norm": 1.0, "server_lr": 1.0},
        "training": {"rounds": 1},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "people.csv").write_text(TABLE)
    (tmp_path / "many.csv").write_text(TABLE + 9 * TABLE.partition("\n")[2])
    return tmp_path


ODD = """# people of two places

age,job,place,income
# the first of them
40,"clerk",north,low

55,"clerk
of the town",south,high
"""


@pytest.mark.parametrize(
    ("declared", "line"),
    [
        ({"categories": {"job": ["clerk", "smith"]}}, "of the town' in line 7"),
        ({"categories": {"job": ["smith"]}}, "'clerk' in line 5"),
        (
            {"drop_missing": True, "fill": {}, "missing": ["north"], "labels": ["low"], "categories": {}},
            "'high' in line 7",
        ),
        ({"columns": ["age", "job", "place", "income"], "fill": {}, "categories": {}}, "'age' in line 3"),
    ],
)
def test_a_place_in_a_csv_file_is_the_line_that_an_editor_shows(tmp_path, declared, line):
    (tmp_path / "odd.csv").write_text(ODD)
    with pytest.raises(UserError, match=line):
        table(file="odd.csv", comment="#", **declared).load(tmp_path)


def table(**changes):
    chosen = {key: value for key, value in DECLARED.items() if key not in ("name", "partition", "test")}
    return Csv(**(chosen | changes))


def arrays_of(source: Csv | Parquet, file: Path) -> dict[str, Any]:
    return source._read(file)


def test_a_table_is_read_as_declared(folder):
    found = arrays_of(table(), folder / "people.csv")
    assert found["inputs"].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert found["labels"].tolist() == [0, 1, 0, 1]
    assert found["client_ids"].tolist() == ["north", "south", "north", "south"]


def test_no_row_changes_another_rows_numbers(folder):
    """Scales and categories are declared: a client's rows look the same beside any other clients."""
    whole = arrays_of(table(), folder / "people.csv")["inputs"]
    (folder / "part.csv").write_text("\n".join([TABLE.splitlines()[0], *TABLE.splitlines()[3:]]))
    assert np.array_equal(arrays_of(table(), folder / "part.csv")["inputs"], whole[2:])


def test_rows_with_missing_values_can_be_left_out(folder):
    found = arrays_of(table(drop_missing=True, fill={}), folder / "people.csv")
    assert found["labels"].tolist() == [0, 0]


def test_a_table_without_a_heading_and_with_several_names_of_a_label(folder):
    (folder / "bare.csv").write_text("|a comment\n40;clerk;north;low.\n25;smith;north;HIGH\n")
    options = {"columns": ["age", "job", "place", "income"], "separator": ";", "comment": "|"}
    found = arrays_of(table(labels=[["low", "low."], ["high", "HIGH"]], **options), folder / "bare.csv")
    assert found["labels"].tolist() == [0, 1]


def test_a_table_goes_through_a_config_and_back(folder):
    config = parse_config(experiment(file="many.csv"))
    assert load_config(config.tables).digest == config.digest
    federation = make_federation(config, folder)
    assert federation.population == 2


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fill": None}, r"a number in column 'age', got a missing value in line 5\. Set data\.fill = \{age = "),
        ({"missing": None}, r"a declared category in column 'job', got '\?' in line 3"),
        (
            {"numeric": {"job": [0, 1]}, "fill": None, "categories": None},
            r"a number in column 'job', got a missing value in line 3",
        ),
        (
            {"numeric": {"job": [0, 1]}, "fill": {"job": 0.0}, "categories": None},
            r"finite numbers in column 'job', got 'clerk ?' in line 2\. Declare the column in data\.categories",
        ),
        ({"labels": ["low"]}, r"a label in column 'income', got 'high' in line 3"),
        (
            {"labels": None},
            r"a label in column 'income', got 'low' in line 2\. List the values of 'income' in data\.labels",
        ),
        ({"target": "incom"}, r"a column 'incom', got age, job, place, income\. Did you mean 'income'"),
        (
            {"fill": {"job": "clerk"}},
            r"^data\.fill: expected columns of data\.numeric, got the column of categories job: .* zeros\. Remove it",
        ),
        ({"fill": {"job": 1.0}}, r"^data\.fill: expected columns of data\.numeric, got the column of categories job"),
        ({"fill": {"age": "old"}}, r"^data\.fill: expected a finite number for age, got 'old'"),
        (
            {"drop_missing": True},
            r"^data\.fill: expected no values with drop_missing = true, .*'age': 40\.0.*Remove fill",
        ),
        ({"numeric": {"age": [40, 0]}}, r"^data\.numeric: expected two finite numbers for age, the second from 1e-20"),
        ({"numeric": {"age": [40]}}, r"^data\.numeric: expected"),
        ({"fill": {"aeg": 1.0}}, r"^data\.fill: expected columns of data\.numeric, got aeg\. Did you mean 'age'"),
        ({"categories": {"age": ["1"]}}, r"^data\.age: expected a column with one meaning"),
        ({"categories": {"job": ["clerk", "clerk"]}}, r"^data\.categories: expected different values of job"),
        ({"numeric": None, "categories": None, "fill": None}, r"^data\.numeric: expected at least one column"),
        ({"file": "absent.csv"}, r"^data\.file: expected an existing file"),
        ({"file": None}, r"^data\.file: expected a path"),
        ({"test": None, "file": "many.csv"}, r"^data\.test: expected a data set with public test examples"),
        ({"test": "public", "file": "many.csv"}, r"^data\.test: expected a data set with public test examples"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(folder, changes, line):
    with pytest.raises(UserError, match=line) as caught:
        make_federation(parse_config(experiment(**changes)), folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'a,b\n1,2,3\n"x', b"age,job,place,income\n"])
def test_a_file_that_is_no_table_is_one_line(folder, content):
    (folder / "people.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"people\.csv: expected") as caught:
        make_federation(parse_config(experiment()), folder)
    assert "\n" not in str(caught.value)


def test_the_command_line_says_it_with_exit_code_2(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    text = 'name="own"\nseed=1\n[model]\nname="softmax"\n[method]\nname="dp-fedavg"\n[training]\nrounds=1\n'
    text += '[data]\nname="csv"\nfile="people.csv"\ntarget="income"\nnumeric={age=[40,15]}\nlabels=["low","high"]\n'
    (folder / "own.toml").write_text(text + "clients=2\n")
    with pytest.raises(SystemExit) as ended:
        main(["check", "own.toml", "--data-root", "."])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("fedpriv: people.csv: expected a number in column 'age', got a missing")


def test_a_parquet_file_is_read_like_the_same_table_in_csv(folder):
    frame = pd.DataFrame({"age": [40, 55.0, 25, None], "job": ["clerk", None, "smith", "clerk"]})
    frame = frame.assign(place=["north", "south"] * 2, income=["low", "high"] * 2)
    frame.to_parquet(folder / "people.parquet")
    chosen: dict[str, Any] = {
        key: DECLARED[key] for key in DECLARED if key not in ("name", "partition", "test", "missing")
    }
    found = arrays_of(Parquet(**{**chosen, "file": "people.parquet"}), folder / "people.parquet")
    expected = arrays_of(table(), folder / "people.csv")
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    with pytest.raises(UserError, match=r"people\.csv: expected a Parquet file, got ArrowInvalid"):
        Parquet(**chosen).load(folder)


def leaf(**changes):
    held = {
        "a": {"x": [[0.0, 1.0], [1.0, 1.0]], "y": [0, 2]},
        "b": {"x": [[0.5, 0.5]], "y": [1]},
        "c": {"x": [], "y": []},
    }
    return {"users": ["a", "b", "c"], "num_samples": [2, 1, 0], "user_data": held} | changes


def test_leaf_users_without_examples_are_clients_too(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(leaf()))
    (tmp_path / "test.json").write_text(json.dumps(leaf()))
    made = Leaf(file="all.json", test_file="test.json").load(tmp_path)
    assert made.natural_population == 3
    assert made.groups is not None
    assert made.groups.tolist() == [0, 0, 1]
    shaped = Leaf(file="all.json", test_file="test.json", shape=[1, 2, 1]).load(tmp_path)
    assert shaped.input_shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("content", "shape", "line"),
    [
        ("{", None, "LEAF's JSON"),
        (json.dumps({"users": ["a"]}), None, "KeyError: 'user_data'"),
        (json.dumps(leaf(users=["a", "d"])), None, "KeyError: 'd'"),
        (json.dumps(leaf(user_data={"a": {"x": [[1.0]], "y": []}}, users=["a"])), None, "as many x as y of user a"),
        (json.dumps(leaf()), [3], r"3 numbers in each input, of shape \[3\], got 2 in row 0"),
        (json.dumps(leaf(user_data={"a": {"x": [["x"]], "y": [0]}}, users=["a"])), None, "inputs that are numbers"),
    ],
)
def test_what_is_no_leaf_is_one_line(tmp_path, content, shape, line):
    (tmp_path / "all.json").write_text(content)
    with pytest.raises(UserError, match=line):
        Leaf(file="all.json", shape=shape).load(tmp_path)


def test_arrays_with_clients(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"inputs": rng.integers(0, 256, (40, 1, 4, 4), dtype="u1"), "labels": np.arange(40) % 2}
    np.savez(tmp_path / "a.npz", **arrays, client_ids=np.arange(40) % 4, classes=3)
    made = Npz(file="a.npz", scale=255.0).load(tmp_path)
    assert (made.natural_population, made.classes, made.input_shape) == (4, 3, (1, 4, 4))
    assert made.train_inputs.max() <= 1.0
    with pytest.raises(UserError, match=r"^data\.scale: expected a scale for inputs that are bytes"):
        Npz(file="a.npz").load(tmp_path)


CASES = {
    "labels_str": ({"labels": np.array(list("abcabc"))}, "labels that are whole numbers"),
    "labels_onehot": ({"labels": np.eye(3, dtype="i8")[[0, 1, 2, 0, 1, 2]]}, "one for each example"),
    "missing": ({"inputs": np.array([[1.0, np.nan]] * 6)}, "NaN or infinity in row 0"),
    "texts": ({"inputs": np.array([["1", "2"]] * 6)}, "inputs that are numbers"),
    "bytes": ({"inputs": np.zeros((6, 2), dtype="u1")}, "inputs of floats"),
    "flat": ({"inputs": np.zeros(6)}, "inputs of floats"),
    "objects": ({"inputs": np.array([[1, "a"]] * 6, dtype=object)}, "without objects"),
    "too few classes": ({"classes": 2}, "classes of at least 3"),
    "no classes": ({"classes": None}, "inputs, labels and classes"),
}


@pytest.mark.parametrize(("changes", "line"), CASES.values(), ids=CASES)
def test_what_is_wrong_with_a_devices_own_file_is_one_line(tmp_path, changes, line):
    arrays = {"inputs": np.ones((6, 2), dtype="f4"), "labels": np.array([0, 1, 2, 0, 1, 2]), "classes": 3}
    np.savez(tmp_path / "a.npz", **{name: value for name, value in (arrays | changes).items() if value is not None})
    with pytest.raises(UserError, match=line) as caught:
        read_own_data(tmp_path / "a.npz")
    assert "a.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "labels", [np.array([[0], [1], [2]]), np.array([0.0, 1.0, 2.0]), np.array([0, 1, 2], dtype="u8")]
)
def test_labels_that_mean_whole_numbers_are_taken(tmp_path, labels):
    np.savez(tmp_path / "a.npz", inputs=np.ones((3, 2), dtype=">f8"), labels=labels, classes=np.float64(3))
    assert read_own_data(tmp_path / "a.npz")[1].tolist() == [0, 1, 2]


EXTREMES = (1e39, 1e308, -1e39, 1e-46, 5e-324, float("inf"), float("nan"), 0.0, -1.0, 10**30)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_scales_are_refused_or_give_finite_inputs(folder, extreme):
    np.savez(folder / "a.npz", inputs=np.full((10, 2), 3e38), labels=np.arange(10) % 2)
    makers = [
        lambda: Npz(file="a.npz", scale=extreme).load(folder),
        lambda: table(file="many.csv", numeric={"age": (extreme, 1.0)}).load(folder),
        lambda: table(file="many.csv", numeric={"age": (1.0, extreme)}).load(folder),
        lambda: table(file="many.csv", fill={"age": extreme}).load(folder),
        lambda: ImageFolder(file="absent", mean=[extreme]).load(folder),
        lambda: ImageFolder(file="absent", std=[extreme]).load(folder),
    ]
    for make in makers:
        try:
            made = make()
        except UserError:  # one line, by its constructor
            continue
        assert made.train_inputs.isfinite().all()


def test_a_folder_of_images_by_client_and_label(tmp_path):
    for client in ("anna", "bert"):
        for label in ("cat", "dog"):
            (tmp_path / "images" / client / label).mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (4, 3), (255, 0, 51)).save(tmp_path / "images" / client / label / f"{i}.png")
    made = ImageFolder(file="images", mean=[1.0, 0.0, 0.0], std=[1.0, 1.0, 0.2]).load(tmp_path)
    assert (made.natural_population, made.classes, made.input_shape) == (2, 2, (3, 3, 4))
    assert made.train_inputs[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.0, 1.0])
    Image.new("L", (4, 3), 9).save(tmp_path / "images" / "bert" / "dog" / "9.png")
    with pytest.raises(UserError, match=r"9\.png: expected channels, height and width \(3, 3, 4\)"):
        ImageFolder(file="images").load(tmp_path)
    (tmp_path / "images" / "bert" / "dog" / "9.png").write_text("no image")
    with pytest.raises(UserError, match=r"9\.png: expected an image"):
        ImageFolder(file="images").load(tmp_path)
    with pytest.raises(UserError, match=r"a label of data\.labels"):
        ImageFolder(file="images", labels=["cat"]).load(tmp_path)
    with pytest.raises(UserError, match=r"LABEL/image\.png"):
        ImageFolder(file="images/anna/cat", clients_first=False).load(tmp_path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (TABLE.replace("job", "age"), "expected columns with different names, got 'age' twice"),
        (TABLE.replace(",low", ",low,high").replace(",high", ",high,"), "expected a CSV file"),
    ],
)
def test_cells_without_a_clear_column_are_refused(folder, content, line):
    (folder / "people.csv").write_text(content)
    with pytest.raises(UserError, match=line):
        table()._read(folder / "people.csv")


BARE = TABLE.partition("\n")[2]
NAMES = TABLE.partition("\n")[0].split(",")
QUOTED = "\n".join(";".join(f'"{cell}"' for cell in row.split(",")) for row in TABLE.splitlines())


@pytest.mark.parametrize(
    ("content", "options", "line"),
    [
        (TABLE.replace(",", ";"), {}, r'separated by ",", got ";"\. Set data\.separator = ";"\.$'),
        (TABLE.replace(",", "\t"), {}, r'separated by ",", got "\\t"\. Set data\.separator = "\\t"\.$'),
        (TABLE.replace(",", "|"), {}, r'separated by ",", got "\|"\. Set data\.separator'),
        (TABLE, {"separator": ";"}, r'separated by ";", got ","\. Set data\.separator = ","\.$'),
        (QUOTED, {}, r'separated by ",", got ";"'),
        ("#a,b\n" + TABLE.replace(",", ";"), {"comment": "#"}, r'separated by ",", got ";"'),
        (TABLE.replace(",", ";").replace("55;", "55,5;"), {}, r'separated by ",", got ";"'),
        (BARE.replace(",", ";"), {"columns": NAMES}, r'separated by ",", got ";"'),
        (BARE, {"columns": NAMES, "separator": ";"}, r'separated by ";", got ","'),
        (TABLE.replace("age,", "older,"), {}, r"a column 'age', got older, job, place, income"),
        (BARE, {"columns": NAMES[1:]}, r"^data\.columns: expected 4 names"),
        (
            TABLE.replace(",", ";").replace("55;", "55,5;"),
            {"separator": ";"},
            r"finite numbers in column 'age', got '55,5' in line 3\. Write numbers with a decimal point",
        ),
    ],
)
def test_a_table_with_another_separator_says_which_one(folder, content, options, line):
    (folder / "people.csv").write_text(content)
    with pytest.raises(UserError, match=line):
        table(**options)._read(folder / "people.csv")


def test_every_reader_of_csv_files_says_which_separator_a_file_has(folder):
    (folder / "said.csv").write_text("user;sentence;label\na;one, two, three;0\n")
    (folder / "said.tsv").write_text("user,sentence,label\na,one,0\n")
    (folder / "devices.csv").write_text("speed;download;upload\n1;2;3\n")
    (folder / "edges.csv").write_text("from\tto\n0\t1\n")
    readers = {
        "said.csv": [Words(file="said.csv", client="user").load, Texts(file="said.csv").load],
        "said.tsv": [Words(file="said.tsv").load, Texts(file="said.tsv").load],
        "devices.csv": [lambda root: Trace(file=str(root / "devices.csv"))],
        "edges.csv": [lambda root: read_edges(str(root / "edges.csv"))],
    }
    for name, loaders in readers.items():
        for load in loaders:
            with pytest.raises(UserError, match=rf"{name}: expected columns separated by .*, got .*\. Save the file"):
                load(folder)


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_marks_and_line_ends_of_other_systems_change_nothing(folder, change):
    (folder / "people.csv").write_bytes(change(TABLE).encode())
    test_a_table_is_read_as_declared(folder)


def test_a_client_written_in_two_ways_is_not_two(folder):
    (folder / "many.csv").write_text(
        (TABLE + 9 * TABLE.partition("\n")[2]).replace("north", "1", 5).replace("north", "1.0")
    )
    with pytest.raises(UserError, match=r"expected clients with different ids, got '1' and '1\.0'"):
        table(file="many.csv").load(folder)


def test_whether_a_clients_rows_are_complete_does_not_change_how_many_clients_there_are(folder):
    """Otherwise one client's data would change the numbers, and so the draws, of all that follow."""
    (folder / "more.csv").write_text((folder / "many.csv").read_text() + ",clerk,east,low\n")
    made = table(file="more.csv", drop_missing=True, fill={}).load(folder)
    assert made.natural_population == 3
    assert made.groups is not None
    assert np.unique(made.groups).tolist() == [1]


def test_one_text_does_not_stand_for_two_labels():
    with pytest.raises(UserError, match=r"^data\.labels: expected different values"):
        table(labels=[["low", "high"], "high"])


def test_test_images_have_the_labels_of_the_others(tmp_path):
    for place in ("train/anna/cat", "train/anna/dog", "test/anna/dog"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (4, 3), 9).save(tmp_path / place / "1.png")
    with pytest.raises(UserError, match=r"^data\.test_file: expected labels \['cat', 'dog'\], got \['dog'\]"):
        ImageFolder(file="train", test_file="test").load(tmp_path)
    made = ImageFolder(file="train", test_file="test", labels=["cat", "dog"]).load(tmp_path)
    assert made.test_labels.tolist() == [1]


@pytest.mark.parametrize(
    ("user", "shape"),
    [({"x": 5, "y": 3}, None), ({"x": [[1, [2]]], "y": [0]}, [2]), ({"x": [["q", "w"]], "y": [0]}, [2])],
)
def test_a_user_of_leaf_without_lists_of_numbers_is_one_line(tmp_path, user, shape):
    (tmp_path / "leaf.json").write_text(json.dumps({"users": ["a"], "user_data": {"a": user}}))
    with pytest.raises(UserError, match=r"leaf\.json: expected"):
        Leaf(file="leaf.json", shape=shape).load(tmp_path)


def test_a_user_of_leaf_twice_is_refused(tmp_path):
    user = {"x": [[1.0]], "y": [0]}
    (tmp_path / "leaf.json").write_text(json.dumps({"users": ["a", "a"], "user_data": {"a": user}}))
    with pytest.raises(UserError, match="expected different users"):
        Leaf(file="leaf.json").load(tmp_path)


def rows_of_people(changed):
    """Return client, two numbers and label of each row; `changed` gives client b other rows."""
    rng = np.random.default_rng(0)
    rows = [(who, *rng.normal(size=2).round(3).tolist(), int(rng.integers(3))) for who in "aabbbcccc" for _ in range(5)]
    if changed:
        rows = [row for row in rows if row[0] != "b"] + [("b", 9.0, -9.0, 2)] * 4
    return rows


def write_csv(folder, rows):
    lines = [f"{who},{x},{y},{label}" for who, x, y, label in rows]
    (folder / "own.csv").write_text("\n".join(["who,x,y,label", *lines]))
    numeric = {"x": [0.0, 1.0], "y": [0.0, 2.0]}
    return {
        "name": "csv",
        "file": "own.csv",
        "target": "label",
        "client": "who",
        "numeric": numeric,
        "labels": list("012"),
    }


def write_npz(folder, rows):
    inputs, labels = np.array([row[1:3] for row in rows]), np.array([row[3] for row in rows])
    np.savez(folder / "own.npz", inputs=inputs, labels=labels, client_ids=[row[0] for row in rows], classes=3)
    return {"name": "npz", "file": "own.npz"}


def write_leaf(folder, rows):
    held = {who: [row for row in rows if row[0] == who] for who in "abc"}
    data = {who: {"x": [row[1:3] for row in own], "y": [row[3] for row in own]} for who, own in held.items()}
    (folder / "own.json").write_text(json.dumps({"users": list("abc"), "user_data": data}))
    return {"name": "leaf", "file": "own.json"}


@pytest.mark.parametrize("write", [write_csv, write_npz, write_leaf])
@pytest.mark.parametrize("test", ["within", "clients"])
def test_a_clients_rows_decide_about_no_other_clients(tmp_path, write, test):
    """Neither about the training rows of others, nor about the held-out people."""
    found = []
    for changed in (False, True):
        folder = tmp_path / str(changed)
        folder.mkdir()
        tables = experiment() | {
            "data": {**write(folder, rows_of_people(changed)), "partition": "natural", "test": test}
        }
        federation = make_federation(parse_config(tables), folder)
        whole = federation.dataset
        rows = [federation.rows_of(client) for client in range(federation.population)]
        held = [(whole.train_inputs[own], whole.train_labels[own]) for own in rows]
        found.append((federation.population, whole.classes, whole.input_shape, held))
    assert found[0][:3] == found[1][:3]
    alike = [
        all(one.shape == other.shape and bool((one == other).all()) for one, other in zip(*pair, strict=True))
        for pair in zip(found[0][3], found[1][3], strict=True)
    ]
    assert alike.count(False) <= 1
    assert alike.count(True) >= 1
