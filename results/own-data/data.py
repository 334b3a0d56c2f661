"""Tiny Shakespeare for a model of sequences: the speakers are the clients, and characters are the tokens."""

from pathlib import Path

import numpy as np

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
IGNORED = -100


def speakers(data_root: Path, positions: int = 32, windows: int = 8) -> dict[str, np.ndarray | list[str] | int]:
    """Return pieces of the speakers' texts, each with the next character at every position.

    A speaker's pieces depend on that speaker alone. Positions after the end of a text do not count.

    Args:
        data_root: The folder with `tinyshakespeare/input.txt`.
        positions: Characters of a piece.
        windows: Maximum number of pieces of a speaker, evenly spaced.
    """
    said: dict[str, list[str]] = {}
    text = (data_root / "tinyshakespeare" / "input.txt").read_text(encoding="ascii")
    for speech in text.strip("\n").split("\n\n"):
        name, _, words = speech.strip("\n").partition("\n")
        said.setdefault(name, []).append(words)
    inputs, labels, who = [], [], []
    for name, speeches in said.items():
        tokens = np.array([ALPHABET.index(character) for character in "\n".join(speeches)], dtype=np.int64)
        starts = np.arange(0, max(len(tokens) - 1, 0), positions)
        for start in starts[np.linspace(0, len(starts) - 1, min(windows, len(starts))).astype(int)]:
            piece = tokens[start : start + positions + 1]
            missing = positions + 1 - len(piece)
            inputs.append(np.pad(piece[:-1], (0, missing)))
            labels.append(np.pad(piece[1:], (0, missing), constant_values=IGNORED))
            who.append(name)
    return {
        "inputs": np.stack(inputs),
        "labels": np.stack(labels),
        "client_ids": who,
        "clients": list(said),
        "classes": len(ALPHABET),
    }
