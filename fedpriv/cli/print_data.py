"""Output of `fedpriv data`."""

import io
from pathlib import Path

import numpy as np

from fedpriv.cli.app import picture
from fedpriv.cli.terminal import say
from fedpriv.data.federation import Holders, plot_who_holds_what, who_holds_what
from fedpriv.errors import has_extra
from fedpriv.experiment.config import Config
from fedpriv.files import write_atomically
from fedpriv.privacy.released import OWNER_ONLY

__all__ = ["show_clients"]

_HEAD = "examples"
# Maximum number of bars of the histogram, and the length of the longest one.
_BARS, _LONGEST = 10, 48


def show_clients(experiment: Config, federation: Holders, directory: Path, *, whole: bool) -> None:
    """Print who holds how many examples, and write the table and the picture of all clients.

    Args:
        experiment: The experiment.
        federation: Its clients.
        directory: The folder of the two files.
        whole: Print the table, too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    table = who_holds_what(federation)
    write_atomically(directory / "clients.csv", table.to_csv(index=False), OWNER_ONLY)
    if has_extra("report"):
        drawn = io.BytesIO()
        plot_who_holds_what(federation, drawn, partition=experiment.tables["data"]["partition"])
        write_atomically(directory / "clients.png", drawn.getvalue(), OWNER_ONLY)
    if whole:
        print(table.to_string(index=False), end="\n\n")
    sizes, labels = federation.sizes, (federation.label_counts() > 0).sum(axis=1)
    say(f"clients     {len(sizes):,}")
    say(f"examples    {sizes.sum():,}; {_spread(sizes)} a client")
    if federation.label_counts().shape[1] > 1:
        say(f"labels      {federation.label_counts().shape[1]:,}; {_spread(labels)} a client")
    say("\n" + _histogram(sizes))
    say(f"\ntable       {directory / 'clients.csv'}\npicture     {picture(directory / 'clients.png')}\n")


def _spread(counts: np.ndarray) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, median {float(np.median(counts)):,g}"


def _histogram(sizes: np.ndarray) -> str:
    """Return a line for each range of sizes, with a bar as long as its share of the clients."""
    low, high = int(sizes.min()), int(sizes.max())
    width = -(-(high - low + 1) // _BARS)
    counts = np.bincount((sizes - low) // width)
    ranges = [(low + width * place, min(low + width * (place + 1) - 1, high)) for place in range(len(counts))]
    texts = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in ranges]
    column = max(len(_HEAD), *map(len, texts))
    lines = [f"{_HEAD:{column}}  clients"]
    for text, count in zip(texts, counts.tolist(), strict=True):
        bar = "█" * round(_LONGEST * count / counts.max()) or ("▏" if count else "")
        lines.append(f"{text:{column}}  {bar}{' ' if bar else ''}{count:,}")
    return "\n".join(lines)
