"""The words of texts by their authors, as letters: data to ask about, not to train on."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from fedpriv.data.dataset import Dataset
from fedpriv.data.files import default_data_root
from fedpriv.data.natural_files import ALPHABET, read_speeches
from fedpriv.data.text.read import read_texts
from fedpriv.errors import UserError
from fedpriv.privacy.released import Whose

__all__ = ["LETTERS", "WORD_LENGTH", "Words", "symbols_of"]

LETTERS = "abcdefghijklmnopqrstuvwxyz'"
"""The letters of words, with the symbols 1 to 27; 0 is the end."""

WORD_LENGTH = 12
_WORD = re.compile(r"[a-z][a-z']*")


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of texts by their authors; an example is one word, and there is nothing to learn from it.

    Words are runs of the letters a to z in lower case and of apostrophes after the first letter; everything else
    separates them. An input is the symbols of a word's first 12 letters, float32 `[12]`, padded with 0; the label is 0.
    A word depends on its own text alone. The only test example is an empty word, a constant.

    Args:
        file: A path from the data root. `.tsv` and `.csv` are tables with a header; other files are plays, as
            `tinyshakespeare/input.txt` is: speeches below the names of their speakers, who are the clients.
        text: In a table, the column of the texts.
        client: In a table, the column of clients' ids; None if every row is a client.
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "public"
    file: str = "tinyshakespeare/input.txt"
    text: str = "sentence"
    client: str | None = None

    def load(self, data_root: Path | None) -> Dataset:
        """Read the file; see `DatasetSource.load`.

        Raises:
            UserError: If the file is missing or damaged, or lacks a column or words.
        """
        path = (data_root or default_data_root()) / Path(self.file).expanduser()
        if not path.is_file():
            raise UserError("data.file", "an existing file", str(path), "Give a path from the data root")
        texts = self._of_table(path) if path.suffix in (".tsv", ".csv") else self._of_play(path)
        said = [_WORD.findall(text.lower()) for text in texts]
        if not any(said):
            raise UserError(str(path), "texts with words", "a file without any", "Replace the file")
        inputs = symbols_of(word for words in said for word in words)
        owners = np.repeat(np.arange(len(said)), [len(words) for words in said])
        return Dataset(
            name="words",
            train_inputs=torch.as_tensor(inputs, dtype=torch.float32),
            train_labels=torch.zeros(len(inputs), dtype=torch.int64),
            test_inputs=torch.zeros(1, WORD_LENGTH),
            test_labels=torch.zeros(1, dtype=torch.int64),
            classes=2,
            groups=owners.astype(np.int64),
            natural_clients=len(said),
        )

    def _of_play(self, path: Path) -> list[str]:
        letters = np.array(list(ALPHABET))
        return ["".join(letters[said]) for said in read_speeches(path).values()]

    def _of_table(self, path: Path) -> list[str]:
        frame = read_texts(path, {"text": self.text, "client": self.client}, str)
        texts = frame[self.text].tolist()
        if self.client is None:
            return texts
        joined: dict[str, list[str]] = {}
        for owner, text in zip(frame[self.client].tolist(), texts, strict=True):
            joined.setdefault(owner, []).append(text)
        return [" ".join(parts) for parts in joined.values()]


def symbols_of(words: Iterable[str]) -> np.ndarray:
    """Return the symbols of the first letters of words, uint8 `[words, 12]`."""
    cut = [word[:WORD_LENGTH].ljust(WORD_LENGTH, "\0") for word in words]
    codes = np.frombuffer("".join(cut).encode("ascii"), dtype=np.uint8).reshape(len(cut), WORD_LENGTH)
    place = np.zeros(128, dtype=np.uint8)
    place[np.frombuffer(LETTERS.encode(), dtype=np.uint8)] = np.arange(1, len(LETTERS) + 1)
    return place[codes]
