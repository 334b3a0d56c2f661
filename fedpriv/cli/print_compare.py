"""Output of `fedpriv compare`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedpriv.cli.terminal import say

__all__ = ["print_comparison"]

Cells = Mapping[str, Mapping[str, str]]
"""Texts by run and key."""

_GAP = 2
# Maximum width of a column (columns of the terminal); longer texts are broken between words.
_WIDEST = 32
# The beginnings of the keys of the first columns.
_FIRST = ("test_", "validation_", "epsilon")


def print_comparison(cells: Cells) -> None:
    """Print runs side by side if they fit, otherwise one below the other, without what is the same in all of them.

    Args:
        cells: Texts by run and key; all runs have the same keys in the same order.
    """
    console = Console()
    keys = list(next(iter(cells.values())))
    widths = [max(map(len, keys)), *(max(len(run), *map(len, row.values())) for run, row in cells.items())]
    if sum(widths) + _GAP * len(widths) <= console.width:
        rows = ((key, *(row[key] for row in cells.values())) for key in keys)
        console.print(_table(("", *cells), rows, left=len(cells) + 1))
        return
    same = [key for key in keys if len({row[key] for row in cells.values()}) == 1]
    names = _short_names(list(cells))
    varying = sorted((key for key in keys if key not in same), key=lambda key: not key.startswith(_FIRST))
    if "method.name" in varying:
        varying.remove("method")
    for block in _blocks(cells, varying, max(map(len, names)), console.width):
        heads = [_head(key, keys) for key in block]
        rows = ((name, *(row[key] for key in block)) for name, row in zip(names, cells.values(), strict=True))
        console.print(_table(("run", *heads), rows, left=1))
        console.print()
    first = next(iter(cells.values()))
    say("same        " + ", ".join(f"{key} {first[key] or 'none'}" for key in same))


def _table(heads: Sequence[str], rows: Iterator[tuple[str, ...]], *, left: int) -> Table:
    shown = Table(box=None, padding=(0, _GAP, 0, 0))
    for place, head in enumerate(heads):
        name = left == 1 and place == 0
        widest = _WIDEST if left == 1 and not name else None
        side = "left" if place < left else "right"
        shown.add_column(head, overflow="fold", justify=side, no_wrap=name, max_width=widest)
    for row in rows:
        shown.add_row(*(text.replace("[", r"\[") for text in row))
    return shown


def _blocks(cells: Cells, keys: Sequence[str], first: int, width: int) -> Iterator[list[str]]:
    """Yield the keys of tables that fit into `width` beside a column of `first`."""
    block: list[str] = []
    room = width - first - _GAP
    for key in keys:
        longest = max(len(_head(key, keys)), *(len(row[key]) for row in cells.values()))
        needs = min(longest, _WIDEST) + _GAP
        if block and needs > room:
            yield block
            block, room = [], width - first - _GAP
        block.append(key)
        room -= needs
    if block:
        yield block


def _head(key: str, keys: Sequence[str]) -> str:
    """Return the last part of a key, or all of it if another key ends likewise."""
    if key == "method.name":
        return "method"
    short = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == short for other in keys) > 1 else short


def _short_names(runs: Sequence[str]) -> list[str]:
    """Return the paths of runs without the folders that they share."""
    shared = os.path.commonpath([str(Path(run).parent) for run in runs]) if len(runs) > 1 else ""
    return [str(Path(run).relative_to(shared)) if shared else run for run in runs]
