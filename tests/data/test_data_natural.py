"""Hospitals and speakers: data sets with natural clients, on files written by the tests."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpriv.data.datasets import HeartDisease, TinyShakespeare
from fedpriv.data.federation import federate
from fedpriv.data.natural_files import (
    ALPHABET,
    HOSPITALS,
    SILENT,
    next_characters,
    one_hot_contexts,
    read_patients,
    read_speeches,
)
from fedpriv.data.partitions import Natural
from fedpriv.errors import UserError

HEALTHY = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0"
SICK = "50,0,4,?,?,?,?,?,?,?,?,?,?,3"


def write_hospitals(root: Path, patients: dict[str, list[str]]) -> None:
    (root / "heart_disease").mkdir()
    for hospital in HOSPITALS:
        rows = patients.get(hospital, [HEALTHY] * 5)
        (root / "heart_disease" / f"processed.{hospital}.data").write_text("\n".join(rows) + "\n")


def write_play(root: Path, text: str) -> Path:
    (root / "tinyshakespeare").mkdir(parents=True)
    path = root / "tinyshakespeare" / "input.txt"
    path.write_text(text)
    return path


# Hospitals


def test_an_attribute_becomes_what_is_written_down(tmp_path):
    path = tmp_path / "rows"
    path.write_text(HEALTHY + "\n")
    inputs, labels = read_patients(path)
    quantities = [1.3, 0, 1.25, 0, 0.66, 0, 0, 0, 1.3, 0]
    codes = [0, 1, *(1, 0, 0, 0), 0, 1, *(0, 0, 1), 1, 0, *(0, 0, 1), *(1, 0, 0, 0), *(0, 1, 0)]
    assert inputs.tolist() == [pytest.approx([*quantities, *codes], abs=1e-6)]
    assert labels.tolist() == [0]


def test_missing_attributes_are_zeros_and_missing_quantities_are_marked(tmp_path):
    path = tmp_path / "rows"
    path.write_text(SICK + "\n" + SICK.replace("4,?,?", "4,0,0") + "\n")
    inputs, labels = read_patients(path)
    assert labels.tolist() == [1, 1]
    assert inputs[0, :10].tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 0, 1]
    assert inputs[0, 10:].tolist() == [1, 0, 0, 0, 0, 1] + 17 * [0]
    assert np.array_equal(inputs[0], inputs[1])  # a pressure of zero was not measured


def test_what_the_unprocessed_files_write_for_a_missing_value_is_one(tmp_path):
    path = tmp_path / "rows"
    path.write_text(SICK + "\n" + SICK.replace("?", "-9") + "\n")
    inputs, _ = read_patients(path)
    assert np.array_equal(inputs[0], inputs[1])


@settings(deadline=None)
@given(others=st.lists(st.sampled_from([HEALTHY, SICK, SICK.replace("50", "29")]), max_size=6))
def test_a_patient_is_encoded_the_same_whoever_else_is_there(tmp_path_factory, others):
    path = tmp_path_factory.mktemp("rows") / "rows"
    path.write_text("\n".join([HEALTHY, *others]))
    among = read_patients(path)[0]
    path.write_text(HEALTHY)
    assert np.array_equal(among[:1], read_patients(path)[0])


def test_hospitals_are_clients_and_a_fifth_of_each_ones_sick_and_healthy_is_for_testing(tmp_path):
    write_hospitals(tmp_path, {"hungarian": [HEALTHY, SICK] * 10, "va": [SICK] * 7})
    data = HeartDisease().load(tmp_path)
    assert (data.examples, len(data.test_labels), data.input_shape, data.classes) == (30, 7, (33,), 2)
    assert data.groups is not None
    assert np.bincount(data.groups).tolist() == [4, 16, 4, 6]
    assert data.test_labels.tolist() == [0, 0, 1, 0, 1, 0, 1]
    assert federate(data, Natural(), None, np.random.default_rng(0)).population == 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        HEALTHY + ",1",
        "1,2",
        HEALTHY + "\n1,2",
        HEALTHY.replace("63.0", "x"),
        SICK.replace("0,4", "0,5"),
        SICK[:-1] + "7",
        SICK[:-1] + "?",
        SICK.replace("50", "inf"),
        SICK.replace("50", "\u00e9"),
    ],
)
def test_a_damaged_hospital_is_named(tmp_path, text):
    write_hospitals(tmp_path, {"switzerland": [text]})
    with pytest.raises(UserError, match=r"processed\.switzerland\.data: ") as caught:
        HeartDisease().load(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_hospitals_are_named_and_nothing_is_downloaded(tmp_path):
    with pytest.raises(
        UserError, match=r"^data\.name: expected the files processed.cleveland.data, .* got 4 missing\."
    ):
        HeartDisease().load(tmp_path)


# Speakers

GHOST = SILENT[0]
PLAY = GHOST + "\nBoo!\n\nANNE:\nHow now!\n\nBOB:\nWell, well.\n\nAnne's Ghost:\n\nANNE:\nGo.\nGo:\n"


def text_of(places: np.ndarray) -> str:
    return "".join(ALPHABET[place] for place in places)


def test_speakers_say_what_stands_below_their_names(tmp_path):
    said = read_speeches(write_play(tmp_path, PLAY))
    assert {name: text_of(places) for name, places in said.items()} == {
        "ANNE:": "How now!\nGo.\nGo:",
        "BOB:": "Well, well.",
        "Anne's Ghost:": "",
    }


def test_a_speaker_who_says_nothing_keeps_the_place_and_the_published_silent_are_no_clients(tmp_path):
    data = TinyShakespeare().load(write_play(tmp_path, PLAY).parents[1])
    assert data.natural_population == 3
    assert federate(data, Natural(), None, np.random.default_rng(0)).sizes.tolist() == [13, 9, 0]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 70))
def test_examples_are_what_was_said_before_and_what_follows(length, context, most):
    said = np.arange(length) % len(ALPHABET)
    seen, following = next_characters(said, context, most)
    assert len(seen) == len(following) == min(length, most)
    at = np.arange(length) if length <= most else np.arange(most) * length // most
    padded = [-1] * context + said.tolist()
    assert following.tolist() == said[at].tolist()
    assert seen.tolist() == [padded[i : i + context] for i in at]


def test_a_context_is_a_one_for_each_character_and_zeros_before_the_first():
    found = one_hot_contexts(np.array([[-1, 0], [64, 3]]))
    assert found.shape == (2, 2, 65)
    assert found.sum(axis=2).tolist() == [[0, 1], [1, 1]]
    assert found.argmax(axis=2)[1].tolist() == [64, 3]


def test_the_last_fifth_of_what_each_speaker_says_is_for_testing(tmp_path):
    write_play(tmp_path, "A:\n" + "ab" * 10 + "\n\nB:\nxyz\n\nC:\n" + "c" * 500 + "\n")
    data = TinyShakespeare(context=2, speaker_examples=50).load(tmp_path)
    assert data.groups is not None
    assert np.bincount(data.groups).tolist() == [16, 3, 40]
    assert (data.input_shape, data.classes, len(data.test_labels)) == ((2, 65), 65, 14)
    assert text_of(data.train_labels[:16].numpy()) + text_of(data.test_labels[:4].numpy()) == "ab" * 10
    assert torch.equal(data.train_inputs[0], torch.zeros(2, 65))


def test_packed_plays_are_read(tmp_path):
    path = write_play(tmp_path, PLAY)
    path.with_suffix(".txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert TinyShakespeare().load(tmp_path).examples == 22


@pytest.mark.parametrize(
    "text", ["", "ANNE:\n", "no name\nspeaks", "ANNE:\n#", "ANNE:\n\u00e9t\u00e9", "ANNE:\nabcd\n"]
)
def test_a_text_that_is_no_play_is_named(tmp_path, text):
    path = write_play(tmp_path, text)
    with pytest.raises(UserError, match=str(path)) as caught:
        TinyShakespeare().load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fields", [{"context": 0}, {"context": 65}, {"context": 1.5}, {"speaker_examples": 0}])
def test_numbers_without_meaning_are_refused(fields):
    with pytest.raises(UserError, match=rf"^data\.{next(iter(fields))}: "):
        TinyShakespeare(**fields)
