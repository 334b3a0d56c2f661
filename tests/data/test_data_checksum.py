"""The checksum of an experiment's data: one byte more or less, anywhere, is other data."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedpriv import load_config
from fedpriv.data import federation
from fedpriv.errors import UserError
from fedpriv.experiment.build import make_federation
from fedpriv.experiment.run import run_experiment
from fedpriv.experiment.watching import StopRun

ROWS, ODD = 4000, 2001  # more than a thousand rows, and one that every second misses
SHARED: dict[str, Any] = {"partition": "natural", "test": "within"}
DATA: dict[str, dict[str, Any]] = {
    "npz": {"name": "npz", "file": "all.npz", **SHARED},
    "npy": {"name": "npy", "inputs": "inputs.npy", "labels": "labels.npy", "client_ids": "people.npy", **SHARED},
    "csv": {"name": "csv", "file": "all.csv", "target": "y", "client": "who", "numeric": {"a": [0, 1]}, **SHARED},
}


def write(folder: Path, kind: str, *, changed: bool = False) -> None:
    """Write inputs of 0, of which one at `ODD` is the next float32 if `changed`."""
    inputs, labels, people = np.zeros((ROWS, 1), np.float32), np.arange(ROWS) % 2, np.arange(ROWS) % 7
    if changed:
        inputs.view(np.uint8)[ODD, 0] = 1
    if kind == "npz":
        np.savez(folder / "all.npz", inputs=inputs, labels=labels, client_ids=people)
    elif kind == "npy":
        for name, array in (("inputs", inputs), ("labels", labels), ("people", people)):
            np.save(folder / f"{name}.npy", array)
    else:
        lines = [f"{who},{a:.1f},{y}" for who, a, y in zip(people, inputs[:, 0], labels, strict=True)]
        if changed:
            lines[ODD] = lines[ODD].replace("0.0", "1.0")
        (folder / "all.csv").write_text("\n".join(["who,a,y", *lines]))


def config(kind: str, **data: Any):
    return load_config(
        {
            "name": "checked",
            "seed": 1,
            "data": DATA[kind] | data,
            "model": {"name": "softmax"},
            "method": {"name": "dp-fedavg", "clip_norm": 1.0},
            "training": {"rounds": 3},
        }
    )


def found(kind: str, folder: Path, **data: Any) -> str:
    return make_federation(config(kind, **data), folder).fingerprint


@pytest.mark.parametrize("kind", DATA)
def test_files_that_differ_in_one_byte_are_other_data(kind, tmp_path):
    """The byte is in an example that a sample of the rows would miss."""
    write(tmp_path, kind)
    first = found(kind, tmp_path)
    write(tmp_path, kind)
    assert found(kind, tmp_path) == first
    write(tmp_path, kind, changed=True)
    assert found(kind, tmp_path) != first
    assert len(first) == 64


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_run_is_not_resumed_with_one_byte_changed(kind, tmp_path):
    def stop(released: Any, _: Any) -> None:
        if released["round"] == 1:
            raise StopRun

    for name, changed in (("same", False), ("other", True)):
        write(tmp_path, kind)
        out = tmp_path / name
        with pytest.raises(StopRun):
            run_experiment(config(kind), out, engine="loop", data_root=tmp_path, watch=stop)
        write(tmp_path, kind, changed=changed)
        if changed:
            with pytest.raises(UserError, match="got different data"):
                run_experiment(config(kind), out, engine="loop", data_root=tmp_path, resume=True)
        else:
            run_experiment(config(kind), out, engine="loop", data_root=tmp_path, resume=True)
            assert json.loads((out / "diagnostics.json").read_text())["data_fingerprint"] == found(kind, tmp_path)


def test_one_pixel_of_a_folder_of_images_counts(tmp_path):
    def folder(value: int) -> str:
        for client in "ab":
            for label in "xy":
                place = tmp_path / "images" / client / label
                place.mkdir(parents=True, exist_ok=True)
                for number in range(300):
                    pixels = np.zeros((2, 2), np.uint8)
                    pixels[0, 0] = value if (client, label, number) == ("b", "x", 151) else 0
                    Image.fromarray(pixels).save(place / f"{number:03}.png")
        data = {"name": "image-folder", "file": "images", **SHARED}
        return make_federation(load_config(config("npz").tables | {"data": data}), tmp_path).fingerprint

    first = folder(0)
    assert folder(0) == first != folder(1)


@pytest.mark.parametrize("held_out", [{}, {"validation": 0.2}, {"test": "clients"}])
def test_held_out_examples_and_scales_count(held_out, tmp_path):
    write(tmp_path, "npy")
    plain = found("npy", tmp_path)
    other = found("npy", tmp_path, **held_out, scale=2.0)
    assert len({plain, other, found("npy", tmp_path, **held_out, scale=2.0, mean=[1.0])}) == 3


def test_a_file_on_the_disk_is_read_once_for_all_federations_of_it(tmp_path, monkeypatch):
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(federation.hashlib, "file_digest", counted)
    write(tmp_path, "npy")
    for share in (0.1, 0.2, 0.3):
        found("npy", tmp_path, validation=share)
    assert [Path(name).name for name in read] == ["inputs.npy"]
    write(tmp_path, "npy", changed=True)
    found("npy", tmp_path)
    assert len(read) == 2


def test_pieces_of_an_array_do_not_depend_on_how_it_lies_in_memory(monkeypatch):
    array = np.arange(60, dtype=np.float32).reshape(12, 5)
    monkeypatch.setattr(federation, "_BLOCK", 64)
    for held in (array, np.asfortranarray(array), np.repeat(array, 2, axis=0)[::2]):
        assert b"".join(block.tobytes() for block in federation._blocks(held)) == array.tobytes()
    assert list(federation._blocks(array[:0])) == []
