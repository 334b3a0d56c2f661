"""`fedpriv new`: write a first experiment from a shipped one.

Shipped experiments are in `sim_configs` next to the package, both in a clone and in an installed wheel.
"""

import json
import re
from pathlib import Path

from fedpriv.checks import folder_name
from fedpriv.errors import UserError, naming, nearest

__all__ = ["SHIPPED", "starters", "write_starter"]

SHIPPED = Path(__file__).parents[2] / "sim_configs"
"""The folder of the shipped experiments."""

_NAME = re.compile(r"^name = .*$", re.MULTILINE)


def starters() -> dict[str, str]:
    """Return the shipped experiments as text by name, without those that need another shipped file."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.toml"))}
    return {name: text for name, text in texts.items() if "sim_configs/" not in text}


def write_starter(name: str, source: str = "quickstart", folder: Path | None = None) -> Path:
    """Write `NAME.toml`, a copy of a shipped experiment, and return its path.

    Args:
        name: The new experiment's name.
        source: The shipped experiment; see `starters`.
        folder: The destination folder; None for the working directory.

    Raises:
        UserError: If there is no such experiment, the name is invalid, or the file exists.
    """
    name = name.removesuffix(".toml")
    folder_name("name", name)
    known = starters()
    if source not in known:
        raise UserError("--from", "a shipped experiment", repr(source), nearest(source, known))
    text = _NAME.sub(lambda _: f"name = {json.dumps(name, ensure_ascii=False)}", known[source], count=1)
    path = Path(f"{name}.toml") if folder is None else folder / f"{name}.toml"
    try:
        with naming(path), path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(str(path), "a new file", "an existing one", "Choose another name") from None
    return path
