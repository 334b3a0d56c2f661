"""A user's file of labeled texts, read as numbers of tokens by the tokenizer of a pretrained model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedpriv.checks import positive_int
from fedpriv.data.dataset import Dataset, Declared
from fedpriv.data.files import DATA_ROOT_VARIABLE, default_data_root, local_path
from fedpriv.data.own import dataset_of
from fedpriv.data.text.read import read_texts
from fedpriv.errors import UserError, require_extra
from fedpriv.privacy.released import Whose

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Texts"]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A user's file of labeled texts (`.tsv` or `.csv` with a header); inputs are numbers of tokens.

    Args:
        file: The texts; a path from the data root.
        test_file: Public test texts. Without it, a fifth of the texts is held out to test on: of each natural client,
            or without natural clients, of each label. With `partition = "natural"`, `data.test` is then required:
            `"within"` tests on that fifth, `"clients"` on all texts of a fifth of the clients instead.
        tokenizer: A `tokenizer.json` of the library tokenizers, or a folder with one; from the current directory, or
            from the package's folder.
        package: Import name of an installed package that holds the tokenizer; None for none.
        length: Number of tokens of an input: longer texts are cut, shorter ones are padded.
        padding: Number of the token that pads them.
        text: The column of the texts.
        target: The column of the labels, whole numbers from 0.
        client: The column of clients' ids; None if there are no natural clients.
        label_count: Number of labels; None for one more than the largest.
        class_names: Names of the labels, in their order; None for none.
    """

    natural: ClassVar[bool] = True
    test: ClassVar[Whose] = "public"
    file: str
    test_file: str | None = None
    tokenizer: str = "."
    package: str | None = None
    length: int = 32
    padding: int = 0
    text: str = "sentence"
    target: str = "label"
    client: str | None = None
    label_count: int | None = None
    class_names: list[str] | None = None

    def __post_init__(self) -> None:
        positive_int("data.length", self.length)

    @property
    def declared(self) -> Declared:
        """The names of the labels; see `Declared`."""
        return Declared(class_names=None if self.class_names is None else tuple(self.class_names))

    def load(self, data_root: Path | None) -> Dataset:
        """Read and tokenize the files; see `DatasetSource.load`.

        Raises:
            UserError: If a file is missing or damaged, or lacks a column.
        """
        root = data_root or default_data_root()
        found = self._read(root, self.file, "data.file")
        if self.test_file is not None:
            tests = self._read(root, self.test_file, "data.test_file")
            found |= {"test_inputs": tests["inputs"], "test_labels": tests["labels"]}
        if self.label_count is not None:
            found["classes"] = self.label_count
        return dataset_of(found, Path(self.file).name)

    def read_inputs(self, path: Path) -> np.ndarray:
        """Return the texts of another file as inputs, float32 `[rows, length]`.

        Raises:
            UserError: If the file is damaged, or lacks the column.
        """
        return self._tokens(self._frame(path, ("text",))[self.text].astype(str).tolist())

    def read_labels(self, path: Path) -> np.ndarray:
        """Return the labels of another file, `[rows]`.

        Raises:
            UserError: If the file is damaged, or lacks the column.
        """
        return self._frame(path, ("target",))[self.target].to_numpy()

    def _read(self, root: Path, file: str, key: str) -> dict[str, object]:
        path = root / Path(file).expanduser()
        if not path.is_file():
            remedy = f"Give a path from the data root, which --data-root or {DATA_ROOT_VARIABLE} sets"
            raise UserError(key, "an existing file", str(path), remedy)
        frame = self._frame(path, ("text", "target", "client"))
        inputs = self._tokens(frame[self.text].astype(str).tolist())
        arrays: dict[str, object] = {"inputs": inputs, "labels": frame[self.target].to_numpy()}
        return arrays if self.client is None else {**arrays, "client_ids": frame[self.client].astype(str).to_numpy()}

    def _frame(self, path: Path, keys: Sequence[str]) -> "pd.DataFrame":
        """Return the table of a file, which has the columns that these keys name."""
        return read_texts(path, {key: getattr(self, key) for key in keys})

    def _tokens(self, texts: list[str]) -> np.ndarray:
        """Return the numbers of tokens, float32 `[texts, length]`; float32 is exact for them."""
        place = local_path("data.tokenizer", self.tokenizer, self.package)
        require_extra('data.name = "text"', "adapters", ["tokenizers"])
        from tokenizers import Tokenizer

        file = place / "tokenizer.json" if place.is_dir() else place
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise UserError("data.tokenizer", "a tokenizer.json", str(error)[:200], "Name another file") from None
        tokenizer.enable_truncation(self.length)
        tokenizer.enable_padding(length=self.length, pad_id=self.padding)
        found = tokenizer.encode_batch_fast(texts)
        return np.array([each.ids for each in found], dtype=np.float32).reshape(len(texts), self.length)
