"""Files of data sets with natural clients: readers that trust nothing they read, and encodings that hold no statistics.

What an attribute or a character becomes is written down here and does not depend on the data that are loaded, so that
loading releases nothing about any client.
"""

from pathlib import Path

import numpy as np

from fedpriv.data.files import REPLACE, content_of
from fedpriv.errors import UserError

__all__ = ["ALPHABET", "HOSPITALS", "SILENT", "next_characters", "one_hot_contexts", "read_patients", "read_speeches"]

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")

# Column, and the round number that is taken off and the one that it is then divided by: years, mm Hg, mg/dl, beats a
# minute, mm.
QUANTITIES = {0: (50, 10), 3: (120, 20), 4: (200, 50), 7: (150, 25), 9: (1, 1)}
# Resting blood pressure and cholesterol: zero was written where nothing was measured.
NEVER_ZERO = (3, 4)
# Column, and the codes that it may hold: sex, chest pain, fasting blood sugar, resting electrocardiogram, angina on
# exercise, slope of the ST segment, coloured vessels, thallium scan.
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
"""The names of the published text below which nothing stands. They are no clients, whatever a file has below them."""


def read_patients(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs float32 `[patients, 33]` and labels int64 `[patients]`, 1 for disease, of one hospital's file.

    A quantity becomes two numbers: (value - a) / b with fixed a and b, and 0; if it is missing, 0 and 1. An attribute
    of several codes becomes a 1 at its own among zeros; a missing one, zeros.

    Args:
        path: Rows of 13 attributes and the diagnosis 0 to 4, with commas between; ? for what is missing.

    Raises:
        UserError: If the file is damaged or holds codes that the attribute does not have.
    """
    expected = "rows of 14 numbers with commas between them, ? for a missing one"
    try:
        rows = [line.split(",") for line in content_of(path).decode("ascii").splitlines() if line.strip()]
        table = np.array([[np.nan if cell.strip() == "?" else float(cell) for cell in row] for row in rows])
    except ValueError as error:
        raise UserError(str(path), expected, str(error), REPLACE) from None
    if table.ndim != 2 or table.shape[1] != 14 or np.isinf(table).any():
        raise UserError(str(path), expected, f"others, of shape {table.shape}", REPLACE)
    diagnoses = table[:, 13]
    table = np.where(table == _MISSING, np.nan, table)
    if not np.isin(diagnoses, range(5)).all():
        raise UserError(str(path), "diagnoses 0 to 4", "others", REPLACE)
    columns = [_quantity(table[:, i], *scale, never_zero=i in NEVER_ZERO) for i, scale in QUANTITIES.items()]
    columns += [_codes(table[:, i], codes, path) for i, codes in CODES.items()]
    return np.concatenate(columns, axis=1).astype(np.float32), (diagnoses > 0).astype(np.int64)


# Stands for a missing value in the unprocessed files, and in what people make of them; no attribute can be so small.
_MISSING = -9.0


def _quantity(values: np.ndarray, middle: float, scale: float, *, never_zero: bool) -> np.ndarray:
    missing = np.isnan(values) | (never_zero & (values == 0))
    return np.column_stack([np.where(missing, 0.0, (values - middle) / scale), missing])


def _codes(values: np.ndarray, codes: tuple[int, ...], path: Path) -> np.ndarray:
    if not (np.isnan(values) | np.isin(values, codes)).all():
        raise UserError(str(path), f"codes {codes}", "others", REPLACE)
    return values[:, None] == np.array(codes)


def read_speeches(path: Path) -> dict[str, np.ndarray]:
    """What each speaker says, as places in `ALPHABET`: int64 `[characters]`, speeches with a line end between them.

    Speakers are in the order of their first headings. A speaker who says nothing keeps the place, with no characters:
    otherwise the words of one client would decide about the numbers of others. `SILENT` names are left out.

    Args:
        path: Speeches with empty lines between them, each the speaker's name and a colon, and what is said below.

    Raises:
        UserError: If the file is damaged, not of this form, or has other characters.
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
        raise UserError(str(path), "speeches", "none", REPLACE)
    return {name: _places("\n".join(speeches)) for name, speeches in said.items()}


def next_characters(said: np.ndarray, context: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` examples of a text, evenly spaced.

    What was said before, int64 `[examples, context]`, -1 before the first character; and the character that follows,
    int64 `[examples]`.

    Args:
        said: int64 `[characters]`.
        context: How many characters before.
        most: How many examples.
    """
    chosen = np.arange(len(said)) if len(said) <= most else np.arange(most) * len(said) // most
    padded = np.concatenate([np.full(context, -1, dtype=np.int64), said])
    return padded[chosen[:, None] + np.arange(context)], said[chosen]


def one_hot_contexts(seen: np.ndarray) -> np.ndarray:
    """float32 `[examples, context, 65]` of `[examples, context]` places in `ALPHABET`; zeros for -1."""
    table = np.concatenate([np.eye(len(ALPHABET), dtype=np.float32), np.zeros((1, len(ALPHABET)), dtype=np.float32)])
    return table[seen]


def _places(text: str) -> np.ndarray:
    place = np.full(128, -1, dtype=np.int64)
    place[np.frombuffer(ALPHABET.encode(), dtype=np.uint8)] = np.arange(len(ALPHABET))
    return place[np.frombuffer(text.encode(), dtype=np.uint8)]
