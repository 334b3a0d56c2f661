"""The run directory: the files that a run writes, and how to read them back."""

import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from fedpriv.data.dataset import Dataset, declared_by
from fedpriv.errors import UserError, naming
from fedpriv.files import lock_file, open_to_append, write_atomically, write_pieces_atomically
from fedpriv.plugins import bare_reference
from fedpriv.privacy.released import OUTPUTS, mode_of
from fedpriv.tables import Record, Table
from fedpriv.vectors import Layout

__all__ = [
    "FILES",
    "Checkpoint",
    "RunDirectory",
    "flat_tables",
    "jsonable",
    "model_facts",
    "safetensors_pieces",
]

FILES = (*(output.name for output in OUTPUTS if output.left), "analysis.json")
"""The files that a finished run leaves in its directory."""

DIAGNOSTICS_FILE = "diagnostics.json"
"""The totals of a finished run that are not released, and a checksum of its data."""

FACTS_FILE = "model.json"
"""The shapes of a model's inputs and outputs, and what the data set declares; see `model_facts`."""

HETEROGENEITY_FILE = "heterogeneity.json"
CLIENTS_FILE = "clients.json"
LEDGERS_FILE = "ledgers.json"
"""Measures of how much the clients of a simulated run differ."""


def safetensors_pieces(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file in pieces, because the library builds the whole file in memory and states may not fit.

    Source: the format's description, version 0.x: header length (8 bytes), JSON header, then the tensors in order.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        kind, shape = _SAFETENSORS_TYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].reshape(-1)
        yield flat.view(torch.uint8).numpy().data if len(flat) else b""


def model_facts(source: object, dataset: Dataset, outputs: int, frozen: str | None = None) -> dict[str, object]:
    """Return the content of `model.json`.

    The shape of inputs and the number of labels are those of the agreement, which `model.safetensors` shows, too. All
    else is declared by the settings of the data set: nothing is computed from examples.

    Args:
        source: The settings of the data set.
        dataset: The data set.
        outputs: Width of the model's outputs.
        frozen: A SHA-256 of the weights that are not trained, which the run does not store; None for none.
    """
    declared = declared_by(source)
    names, named = declared.class_names, dataset.kind in ("classes", "flags")
    return {
        "input_shape": list(dataset.input_shape),
        "classes": dataset.classes,
        "outputs": outputs,
        "class_names": list(names) if names is not None and named and len(names) == dataset.classes else None,
        "inputs": {
            "scale": declared.scale,
            "mean": list(declared.mean),
            "std": list(declared.std),
            "columns": declared.columns,
        },
        **({} if frozen is None else {"frozen_sha256": frozen}),
    }


def jsonable(value: object) -> object:
    """Return the value with every number that JSON cannot represent (infinite, NaN) replaced by None."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# The last tensor of a checkpoint: the SHA-256 of all bytes before it.
_SEAL = "~sha256"
_SEAL_BYTES = 32
_CHUNK = 1 << 20


def _sealed(pieces: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield a file's pieces, with the SHA-256 of the others in place of the last one."""
    found, held = hashlib.sha256(), next(pieces)
    for piece in pieces:
        found.update(held)
        yield held
        held = piece
    yield found.digest()


class Checkpoint:
    """One file with everything needed to resume a run: the server's state, the clients' states, the round.

    Tensors are named `server.FIELD` and `client.FIELD`; round, digest and the checksums of the recorded rows are in the
    file's metadata. The file ends with a checksum of its bytes.
    """

    VERSION = "2"

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(
        self,
        digest: str,
        promise: str,
        round: int,
        server: dict[str, Tensor],
        client: dict[str, Tensor],
        rows: "dict[str, RowsSum] | None" = None,
    ) -> None:
        """Replace the checkpoint by the state after `round`; `promise` must stay the same until the end of the run.

        Args:
            digest: The experiment.
            promise: Its data and privacy terms.
            round: The last finished round.
            server: The server's state.
            client: The clients' states.
            rows: The checksums of the files of rows, by name.
        """
        tensors = {f"server.{k}": v for k, v in server.items()} | {f"client.{k}": v for k, v in client.items()}
        sums = {name: (rows.length, rows.hexdigest) for name, rows in (rows or {}).items()}
        metadata = {"version": self.VERSION, "digest": digest, "promise": promise, "round": str(round)}
        metadata["rows"] = json.dumps(sums)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        contiguous[_SEAL] = torch.zeros(_SEAL_BYTES, dtype=torch.uint8)
        write_pieces_atomically(self.path, _sealed(safetensors_pieces(contiguous, metadata)), mode_of(self.path.name))

    def round(self) -> int | None:
        """Return the round of the checkpoint, without reading its tensors; None if there is no checkpoint.

        Raises:
            UserError: If the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(str(self.path), framework="pt") as file:
                return int((file.metadata() or {})["round"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            remedy = "Restore the file, or start the run again with a new --out"
            raise UserError(str(self.path), "an undamaged checkpoint", str(error), remedy) from None

    def read(self, digest: str, promise: str) -> tuple[int, dict[str, Tensor], dict[str, Tensor]] | None:
        """Return round, server tensors and client tensors; None if there is no checkpoint yet.

        Raises:
            UserError: If the file is damaged, belongs to another experiment, or was written under other privacy terms.
                Otherwise other data, or another version's noise, would be mixed into the run.
        """
        if not self.path.exists():
            return None
        remedy = "Restore the file from a copy, or start again with a new --out"
        try:
            with safe_open(str(self.path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(str(self.path), "an undamaged checkpoint", str(error), remedy) from None
        if metadata.get("version") == self.VERSION and not self._whole():
            raise UserError(str(self.path), "an undamaged checkpoint", "bytes that differ from its checksum", remedy)
        if metadata.get("version") != self.VERSION or metadata.get("digest") != digest:
            raise UserError(str(self.path), "this experiment's checkpoint", str(metadata), "Choose another --out")
        if metadata.get("promise") != promise:
            remedy = "Resume with the run's original versions, data and options, or start again with a new --out"
            ours, theirs = (text.partition(", ") for text in (promise, str(metadata.get("promise"))))
            # The first part is a checksum of the data, which must never reach the screen or a log.
            expected, got = (f"({ours[2]})", f"({theirs[2]})") if ours[0] == theirs[0] else ("", "different data")
            raise UserError(str(self.path), f"the same privacy terms and data {expected}", got, remedy)
        parts = {side: _part(tensors, side) for side in ("server.", "client.")}
        return int(metadata["round"]), parts["server."], parts["client."]

    def rows(self) -> dict[str, tuple[int, str]]:
        """Return length (bytes) and SHA-256 of each file of rows when the checkpoint was written, by name."""
        with safe_open(str(self.path), framework="pt") as file:
            return json.loads((file.metadata() or {})["rows"])

    def _whole(self) -> bool:
        """Return whether the file ends with the checksum of its other bytes."""
        with self.path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size - _SEAL_BYTES
            return _digest_of(file, length).digest() == file.read()


class RowsSum:
    """The length (bytes) and the SHA-256 of a file of rows, kept up to date as rows are appended."""

    def __init__(self, content: bytes = b"") -> None:
        self.length, self._sum = len(content), hashlib.sha256(content)

    def add(self, line: bytes) -> None:
        """Add an appended line."""
        self.length += len(line)
        self._sum.update(line)

    @property
    def hexdigest(self) -> str:
        """The SHA-256 so far."""
        return self._sum.hexdigest()


def _digest_of(file: BinaryIO, length: int) -> "hashlib._Hash":
    """Return the SHA-256 of the next `length` bytes of a file, or of all if there are fewer."""
    found = hashlib.sha256()
    while length > 0 and (piece := file.read(min(_CHUNK, length))):
        found.update(piece)
        length -= len(piece)
    return found


def _part(tensors: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    return {name.removeprefix(side): tensor for name, tensor in tensors.items() if name.startswith(side)}


def _difference(config: Path, toml: str) -> str:
    """Describe the first key in which two configs differ, with both values."""
    try:
        theirs = flat_tables(tomllib.loads(config.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return "its config.toml cannot be read"
    ours = flat_tables(tomllib.loads(toml))
    for key in (*ours, *theirs):
        there, here = theirs.get(key), ours.get(key)
        if key.startswith("sources.") and isinstance(there, dict) and isinstance(here, dict):
            there, here = there.get("sha256"), here.get("sha256")
        if bare_reference(there) != bare_reference(here):
            return f"{key} is {there!r} there and {here!r} here"
    return "written by another version"


def flat_tables(tables: Table) -> dict[str, object]:
    """Flatten TOML tables to keys `table.key`."""
    flat: dict[str, object] = {}
    for key, value in tables.items():
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _read_json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(str(path), "JSON", str(error), "Repair the file, or start again with a new --out") from None


class RunDirectory:
    """The files of one run.

    Args:
        path: The directory; created if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = Checkpoint(path / "checkpoint.safetensors")
        self._sums: dict[str, RowsSum] = {}

    def file(self, name: str) -> Path:
        """Return the path of one of the run's files."""
        return self.path / name

    def claim(self, toml: str, digest: str, *, resume: bool) -> Record | None:
        """Claim the directory for this experiment; return the summary if the run is finished, otherwise None.

        Call it while the directory is locked; otherwise two runs may claim it at once.

        Raises:
            UserError: If it holds another experiment, or this one and `resume` is not set.
        """
        config, stamp = self.file("config.toml"), self.file("digest.txt")
        if config.exists():
            found = stamp.read_text(errors="replace").strip() if stamp.exists() else "unknown"
            if found != digest:
                what = f"a different experiment ({_difference(config, toml)})"
                expected = "this experiment, to resume it" if resume else "a folder without a run"
                raise UserError(str(self.path), expected, what, "Choose another --out, or remove it")
            if not resume:
                raise UserError(
                    str(self.path),
                    "a folder without a run",
                    "this experiment, started or finished",
                    "Add --resume (in Python, resume=True) to continue it, or choose another --out",
                )
            self._shut()
            return self._finished(digest)
        if self.file("trials").is_dir():
            raise UserError(str(self.path), "a folder without a sweep", "a folder with one", "Choose another --out")
        foreign = [name for name in (*FILES, self.checkpoint.path.name) if self.file(name).exists()]
        if foreign:
            raise UserError(
                str(self.path), "a folder without a run's files", ", ".join(foreign), "Choose another --out"
            )
        self.write_text(stamp.name, digest + "\n")
        self.write_text(config.name, toml)
        return None

    def _shut(self) -> None:
        """Restrict files that an older version left readable by others."""
        for file in (self.file(output.name) for output in OUTPUTS):
            if (mode := mode_of(file.name)) is not None and file.exists() and file.stat().st_mode & 0o077:
                file.chmod(mode)

    def _finished(self, digest: str) -> Record | None:
        summary = self.read_json("summary.json")
        if summary is not None and (not isinstance(summary, dict) or summary.get("digest") != digest):
            where = str(self.file("summary.json"))
            raise UserError(
                where, "this experiment's summary", "that of a different experiment", "Choose another --out"
            )
        return summary

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the directory and lock it against other runs within the context.

        Raises:
            UserError: If it is not writable, or another run is writing to it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(str(self.path), "a writable folder", error.strerror, "Choose another --out") from None
        with self.file(".lock").open("w") as lock:
            try:
                lock_file(lock, wait=False)
            except OSError:
                raise UserError(
                    str(self.path),
                    "a folder that no other run uses",
                    "a folder that a run is using",
                    "Wait, or choose another --out",
                ) from None
            yield

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        write_atomically(self.file(name), text, mode_of(name))

    def write_json(self, name: str, value: object) -> None:
        """Write a JSON file."""
        self.write_text(name, json.dumps(jsonable(value), indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """Return the contents of a JSON file; None if it is missing. Raise UserError if it is damaged."""
        path = self.file(name)
        return _read_json(path, path.read_bytes()) if path.exists() else None

    def write_model(self, name: str, model: Tensor, layout: Layout) -> None:
        """Write one tensor `model`, `[params]` float32, with its parts' names and shapes in the metadata."""
        metadata = {"layout": json.dumps(layout.entries)}
        tensors = {"model": model.detach().cpu().to(torch.float32).contiguous()}
        write_atomically(self.file(name), safetensors_bytes(tensors, metadata), mode_of(name))

    def append(self, name: str, row: Table) -> None:
        """Append one row to a JSON-lines file."""
        line = (json.dumps(jsonable(row)) + "\n").encode()
        with naming(self.file(name)), open_to_append(self.file(name), mode_of(name)) as file:
            known = self._sums.get(name)
            if known is None or known.length != os.fstat(file.fileno()).st_size:
                known = self._sums[name] = RowsSum(self.file(name).read_bytes())
            file.write(line)
        known.add(line)

    def rows(self, name: str) -> list[Record]:
        """Return the complete rows of a JSON-lines file. Skips a torn last line; raises UserError for a damaged one."""
        path = self.file(name)
        if not path.exists():
            return []
        rows = [_read_json(path, line) for line in path.read_bytes().split(b"\n")[:-1]]
        if not all(isinstance(row, dict) and isinstance(row.get("round"), int) for row in rows):
            raise UserError(str(path), "rows with a round", "a row without one", "Start again with a new --out")
        return rows

    def save(self, digest: str, promise: str, round: int, server: dict[str, Tensor], client: dict[str, Tensor]) -> None:
        """Write the checkpoint, with the checksums of the rows before it; see `Checkpoint.write`."""
        for name in self._sums:
            with self.file(name).open("rb") as file:
                os.fsync(file.fileno())
        self.checkpoint.write(digest, promise, round, server, client, self._sums)

    def saved(self, digest: str, promise: str) -> tuple[int, dict[str, Tensor], dict[str, Tensor]] | None:
        """Return what `Checkpoint.read` returns, if the rows before the checkpoint are there, unchanged.

        Raises:
            UserError: If the checkpoint is damaged or does not fit, or if rows are missing or were changed.
        """
        found = self.checkpoint.read(digest, promise)
        for name, (length, wanted) in ({} if found is None else self.checkpoint.rows()).items():
            path = self.file(name)
            content = path.read_bytes()[:length] if path.exists() else b""
            if RowsSum(content).hexdigest != wanted:
                got = "a missing file" if not path.exists() else "rows that are missing or were changed"
                remedy = "Restore the file from a copy, or start again with a new --out"
                raise UserError(str(path), "the rows before the checkpoint", got, remedy)
        return found

    def keep_rows(self, name: str, last_round: int) -> list[Record]:
        """Drop the rows of rounds after `last_round` and return the remaining ones."""
        kept = [row for row in self.rows(name) if row["round"] <= last_round]
        content = "".join(json.dumps(row) + "\n" for row in kept)
        self.write_text(name, content)
        self._sums[name] = RowsSum(content.encode())
        return kept
