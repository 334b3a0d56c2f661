"""The table of methods in the README: `python -m fedpriv.cli.methods_table` prints it."""

from fedpriv.methods.base import METHODS, Row

__all__ = ["methods_table"]

_HEADS = Row(message="message of client i", memory="memory", server="server", source="source")


def methods_table() -> str:
    """Return a Markdown table with a row for each of `METHODS`."""
    rows = {"`method.name`": _HEADS, **{f"`{name}`": kind.row for name, kind in METHODS.items()}}
    head, *lines = (f"| {' | '.join((name, *_escaped(row)))} |" for name, row in rows.items())
    return "\n".join((head, "|---" * (len(Row._fields) + 1) + "|", *lines))


def _escaped(row: Row) -> tuple[str, ...]:
    return tuple(cell.replace("|", r"\|") for cell in row)


if __name__ == "__main__":
    print(methods_table())
