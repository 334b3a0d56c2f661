"""Readers for data sets with natural clients. They validate all input and use fixed encodings, no statistics.

The encoding of every attribute and character is fixed in this file and independent of the loaded data, so loading
releases nothing about any client.
"""

from pathlib import Path

import numpy as np

from fedpriv.data.files import REPLACE, content_of
from fedpriv.errors import UserError

__all__ = ["ALPHABET", "HOSPITALS", "SILENT", "next_characters", "one_hot_contexts", "read_patients", "read_speeches"]

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")

# By column, the round number to subtract and the one to divide by: years, mm Hg, mg/dl, beats a minute, mm.
QUANTITIES = {0: (50, 10), 3: (120, 20), 4: (200, 50), 7: (150, 25), 9: (1, 1)}
# Resting blood pressure and cholesterol: the file has zero for missing measurements.
NEVER_ZERO = (3, 4)
# By column, the valid codes: sex, chest pain, fasting blood sugar, resting electrocardiogram, angina on exercise, slope
# of the ST segment, colored vessels, thallium scan.
CODES = {1: (0, 1), 2: (1, 2, 3, 4), 5: (0, 1), 6: (0, 1, 2), 8: (0, 1), 10: (1, 2, 3), 11: (0, 1, 2, 3), 12: (3, 6, 7)}

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""The characters of tiny Shakespeare."""

SILENT = (
    "Ghost of Prince Edward:",
    "Ghost of King Henry VI:",
    "Ghost of CLARENCE:",
    "Ghost of RIVERS:",
    "Ghost of GREY:",
    "Ghost of VAUGHAN:",
    "Ghost of HASTINGS:",
    "Ghosts of young Princes:",
    "Ghost of LADY ANNE:",
    "Ghost of BUCKINGHAM:",
)
"""Names without any text below them in the published file. They are never clients, in any version of the file."""


def read_patients(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs float32 `[patients, 33]` and labels int64 `[patients]` of one hospital's file; 1 means disease.

    A quantity becomes two numbers: (value - a) / b with fixed a and b, and 0; if it is missing, 0 and 1. An attribute
    with several codes is one-hot encoded; a missing one is all zeros.

    Args:
        path: Comma-separated rows of 13 attributes and the diagnosis 0 to 4; ? marks a missing value.

    Raises:
        UserError: If the file is damaged or contains codes that the attribute does not have.
    """
    expected = "comma-separated rows of 14 numbers, ? for a missing one"
    try:
        rows = [line.split(",") for line in content_of(path).decode("ascii").splitlines() if line.strip()]
        table = np.array([[np.nan if cell.strip() == "?" else float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise UserError(str(path), expected, str(error), REPLACE) from None
    if table.ndim != 2 or table.shape[1] != 14 or np.isinf(table).any():
        raise UserError(str(path), expected, f"a table of shape {table.shape}", REPLACE)
    diagnoses = table[:, 13]
    table = np.where(table == _MISSING, np.nan, table)
    wrong = diagnoses[~np.isin(diagnoses, range(5))]
    if len(wrong):
        raise UserError(str(path), "diagnoses 0 to 4", f"{wrong[0]:g}", REPLACE)
    columns = [_quantity(table[:, i], *scale, never_zero=i in NEVER_ZERO) for i, scale in QUANTITIES.items()]
    columns += [_codes(table[:, i], codes, path) for i, codes in CODES.items()]
    return np.concatenate(columns, axis=1).astype(np.float32), (diagnoses > 0).astype(np.int64)


# Stands for a missing value in the unprocessed files and in copies of them; no attribute can be so small.
_MISSING = -9.0


def _quantity(values: np.ndarray, middle: float, scale: float, *, never_zero: bool) -> np.ndarray:
    missing = np.isnan(values) | (never_zero & (values == 0))
    return np.column_stack([np.where(missing, 0.0, (values - middle) / scale), missing])


def _codes(values: np.ndarray, codes: tuple[int, ...], path: Path) -> np.ndarray:
    wrong = values[~(np.isnan(values) | np.isin(values, codes))]
    if len(wrong):
        raise UserError(str(path), f"codes {codes}", f"{wrong[0]:g}", REPLACE)
    return values[:, None] == np.array(codes)


def read_speeches(path: Path) -> dict[str, np.ndarray]:
    """Return each speaker's speeches as indices into `ALPHABET`, int64 `[characters]`, joined by newlines.

    Speakers are in the order of their first headings. A speaker without words keeps the index, with no characters:
    otherwise one client's words would decide the numbers of other clients. `SILENT` names are left out.

    Args:
        path: Speeches separated by empty lines, each a line with the speaker's name and a colon, then the text.

    Raises:
        UserError: If the file is damaged, has another form, or contains other characters.
    """
    try:
        text = content_of(path).decode("ascii")
    except ValueError as error:
        raise UserError(str(path), "text in ASCII", str(error), REPLACE) from None
    others = sorted(set(text) - set(ALPHABET))
    if others:
        expected = "the 65 characters of tiny Shakespeare"
        raise UserError(str(path), expected, ", ".join(map(repr, others[:5])), REPLACE)
    said: dict[str, list[str]] = {}
    for speech in filter(None, (part.strip("\n") for part in text.split("\n\n"))):
        name, _, words = speech.partition("\n")
        if not name.endswith(":"):
            raise UserError(str(path), "a name and a colon above each speech", repr(name[:40]), REPLACE)
        if name not in SILENT:
            said.setdefault(name, []).extend([words] if words else [])
    if not any(said.values()):
        raise UserError(str(path), "speeches", "a file without any", REPLACE)
    return {name: _places("\n".join(speeches)) for name, speeches in said.items()}


def next_characters(said: np.ndarray, context: int, maximum: int) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `maximum` examples of a text, evenly spaced.

    An example is the preceding context, int64 `[examples, context]` with -1 before the first character, and the next
    character, int64 `[examples]`.

    Args:
        said: int64 `[characters]`.
        context: Number of preceding characters.
        maximum: Maximum number of examples.
    """
    everything = len(said) <= maximum
    chosen = np.arange(len(said)) if everything else np.arange(maximum) * len(said) // maximum
    padded = np.concatenate([np.full(context, -1, dtype=np.int64), said])
    return padded[chosen[:, None] + np.arange(context)], said[chosen]


def one_hot_contexts(seen: np.ndarray) -> np.ndarray:
    """Return one-hot vectors, float32 `[examples, context, 65]`, of indices `[examples, context]`; zeros for -1."""
    table = np.concatenate([np.eye(len(ALPHABET), dtype=np.float32), np.zeros((1, len(ALPHABET)), dtype=np.float32)])
    return table[seen]


def _places(text: str) -> np.ndarray:
    place = np.full(128, -1, dtype=np.int64)
    place[np.frombuffer(ALPHABET.encode(), dtype=np.uint8)] = np.arange(len(ALPHABET))
    return place[np.frombuffer(text.encode(), dtype=np.uint8)]
