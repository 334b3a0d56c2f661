"""Tables of texts with a header: `.tsv` files, and CSV files with commas."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpriv.data.files import refuse_other_separator
from fedpriv.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["read_texts"]


def read_texts(path: Path, columns: Mapping[str, str | None], kind: type[str] | None = None) -> "pd.DataFrame":
    """Return a table of texts.

    Args:
        path: A `.tsv` file, in which quotes have no meaning, or a CSV file.
        columns: For each key of `[data]`, the column that it names; None for none.
        kind: The type of all cells; None for the one that fits each column.

    Raises:
        UserError: If the file is damaged, or lacks a column.
    """
    import pandas as pd

    wanted = {key: column for key, column in columns.items() if column is not None}
    options: dict[str, Any] = {"sep": "\t", "quoting": 3} if path.suffix == ".tsv" else {"sep": ","}
    try:
        frame = pd.read_csv(path, keep_default_na=False, dtype=kind, **options)
    except (OSError, ValueError) as error:
        refuse_other_separator(path, options["sep"], wanted.values())
        raise UserError(str(path), "a table with a header", str(error)[:200], "Correct the file") from None
    for key, column in wanted.items():
        if column not in frame:
            refuse_other_separator(path, options["sep"], wanted.values())
            raise UserError(f"data.{key}", f"a column of {path.name}", repr(column), nearest(column, frame))
    return frame
