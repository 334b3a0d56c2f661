"""A sentence of each client, as a file of the data set `words`."""

from pathlib import Path
from typing import Any

SAID = ["the the a", "the cat", "a the", "", "cat's", "of the"]
"""The sentences, dealt to the clients in turn."""


def write_said(folder: Path, clients: int) -> Path:
    """Write `said.csv`, with one sentence of each client, and return its folder."""
    rows = [f"{client},{SAID[client % len(SAID)]}" for client in range(clients)]
    (folder / "said.csv").write_text("\n".join(["who,sentence", *rows]) + "\n")
    return folder


def said_tables(length: int, **privacy: Any) -> dict[str, Any]:
    """Return the config of an analysis that looks for the two most frequent words."""
    return {
        "name": "words",
        "seed": 4,
        "data": {"name": "words", "file": "said.csv", "client": "who", "partition": "natural"},
        "analysis": {"frequent": {"kind": "heavy-hitters", "top": 2, "length": length}},
        "privacy": privacy,
    }
