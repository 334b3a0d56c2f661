"""`fedpriv new`: a first experiment, made of one that is shipped.

Shipped experiments lie in `sim_configs` beside the package, in a clone as in an installed wheel.
"""

import json
import re
from pathlib import Path

from fedpriv.errors import UserError, nearest
from fedpriv.experiment.config import parse_config, read_config_text

__all__ = ["SHIPPED", "starters", "write_starter"]

SHIPPED = Path(__file__).parents[2] / "sim_configs"
"""Where the shipped experiments lie."""

_NAME = re.compile(r"^name = .*$", re.MULTILINE)


def starters() -> dict[str, str]:
    """The shipped experiments by name, as text; those that need another shipped file besides are left out."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.toml"))}
    return {name: text for name, text in texts.items() if "sim_configs/" not in text}


def write_starter(name: str, source: str = "quickstart", folder: Path | None = None) -> Path:
    """Writes `NAME.toml`, an experiment like a shipped one, and returns its path.

    Args:
        name: What the experiment is called.
        source: The shipped experiment; see `starters`.
        folder: Where to; None for the working directory.

    Raises:
        UserError: If there is no such experiment, the name is none that an experiment can have, or the file exists.
    """
    known = starters()
    if source not in known:
        raise UserError("--from", "a shipped experiment", repr(source), nearest(source, known))
    text = _NAME.sub(lambda _: f"name = {json.dumps(name, ensure_ascii=False)}", known[source], count=1)
    parse_config(read_config_text(text, "NAME"))
    path = Path(f"{name}.toml") if folder is None else folder / f"{name}.toml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(str(path), "no such file yet", "one that is there", "Choose another name") from None
    return path
