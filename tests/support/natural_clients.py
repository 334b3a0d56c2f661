"""Data sets with natural clients as files that a test writes, and the changes that one client may make in them."""

import dataclasses
import itertools
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedpriv.data.natural_files import ALPHABET, CODES, HOSPITALS, QUANTITIES

CHANGED = 1
"""The client with changing data, by its place among all natural clients."""

# Data of natural clients before any file: of each client its rows, each a row of the file that is written.
Rows = dict[int, list[Any]]


def patient(rng: random.Random) -> str:
    values = {column: rng.choice(codes) for column, codes in CODES.items()}
    values |= {column: round(middle + scale * rng.gauss(0, 1), 1) for column, (middle, scale) in QUANTITIES.items()}
    return ",".join([*("?" if rng.random() < 0.1 else str(values[i]) for i in range(13)), str(rng.randrange(5))])


def write_hospitals(root: Path, held: Rows) -> None:
    (root / "heart_disease").mkdir(parents=True)
    for number, hospital in enumerate(HOSPITALS):
        (root / "heart_disease" / f"processed.{hospital}.data").write_text("\n".join(held[number]) + "\n")


def sentence(rng: random.Random) -> str:
    return "".join(rng.choice(ALPHABET[1:]) for _ in range(rng.randrange(4, 12)))


def write_play(root: Path, held: Rows) -> None:
    """Speakers take turns; one with nothing left to say still has a heading."""
    (root / "tinyshakespeare").mkdir(parents=True)
    turns = itertools.zip_longest(*held.values(), fillvalue="")
    speeches = [f"{'ABCDEF'[number]}:\n{said}" for turn in turns for number, said in enumerate(turn)]
    (root / "tinyshakespeare" / "input.txt").write_text("\n\n".join(speeches) + "\n")


def image(rng: random.Random) -> tuple[int, bytes]:
    return rng.randrange(10), rng.randbytes(28 * 28)


def idx(array: np.ndarray, kind: int) -> bytes:
    return struct.pack(">HBB", 0, kind, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def write_writers(root: Path, held: Rows) -> None:
    """Writers' images one after the other, turn by turn, under numbers with gaps; ten images by others to test on."""
    for folder in ("MNIST/raw", "QMNIST/raw"):
        (root / folder).mkdir(parents=True)
    rows = [(100 + 7 * i, *row) for turn in itertools.zip_longest(*held.values()) for i, row in enumerate(turn) if row]
    others = [(0, *image(random.Random(number))) for number in range(10)]
    for split, part in (("train", rows), ("t10k", others)):
        pixels = np.frombuffer(b"".join(content for *_, content in part), dtype=np.uint8).reshape(-1, 28, 28)
        labels = np.array([label for _, label, _ in part], dtype=np.uint8)
        (root / "MNIST" / "raw" / f"{split}-images-idx3-ubyte").write_bytes(idx(pixels, 0x08))
        (root / "MNIST" / "raw" / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels, 0x08))
    facts = np.zeros((len(rows), 8), dtype=">i4")
    facts[:, 0], facts[:, 2] = [label for _, label, _ in rows], [writer for writer, *_ in rows]
    (root / "QMNIST" / "raw" / "qmnist-train-labels-idx2-int").write_bytes(idx(facts, 0x0C))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A data set with natural clients: number of clients, content of a row, change of a label, writing of files."""

    clients: int
    row: Callable[[random.Random], Any]
    relabeled: Callable[[Any], Any]
    write: Callable[[Path, Rows], None]

    def held(self) -> Rows:
        rng = random.Random(5)
        return {i: [self.row(rng) for _ in range(6 + 3 * i)] for i in range(self.clients)}

    def neighbor(self, change: str) -> Rows:
        held, rng = self.held(), random.Random(9)
        rows = held[CHANGED]
        held[CHANGED] = {
            "labels": lambda: [self.relabeled(row) for row in rows],
            "order": lambda: rng.sample(rows, len(rows)),
            "values": lambda: [self.row(rng) for _ in rows],
            "fewer": lambda: rows[:4],
            "more": lambda: [*rows, *(self.row(rng) for _ in range(30))],
            "none": list,
        }[change]()
        return held


KINDS = {
    "heart-disease": Kind(
        4, patient, lambda row: row[:-1] + "1" if row[-1] == "0" else row[:-1] + "0", write_hospitals
    ),
    "tiny-shakespeare": Kind(6, sentence, lambda row: row.swapcase(), write_play),
    "mnist-by-writer": Kind(6, image, lambda row: ((row[0] + 1) % 10, row[1]), write_writers),
}
