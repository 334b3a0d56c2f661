"""`fedpriv deploy status` and `list`: print the view of a deployment once, or again and again."""

import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from fedpriv.deploy.status.table import as_json as json_of
from fedpriv.deploy.status.table import list_table, status_table
from fedpriv.deploy.status.view import view_of
from fedpriv.errors import UserError

__all__ = ["show_list", "show_status"]

_REFRESH_SECONDS = 2.0


def show_status(folder: Path, run: Path | None = None, *, watch: bool = False, as_json: bool = False) -> None:
    """Print the status of a deployment.

    Args:
        folder: See `view_of`.
        run: See `view_of`.
        watch: Replace the table every two seconds, until Ctrl-C.
        as_json: Print JSON instead of a table.

    Raises:
        UserError: If the folder is not one of a deployment, or if `watch` and `as_json` are both set.
    """
    if watch and as_json:
        raise UserError("--watch", "a table", "--json", "Drop one of the two options")
    if as_json:
        print(json_of(view_of(folder, run)))
        return
    console = Console()
    if not watch:
        console.print(status_table(view_of(folder, run)), soft_wrap=False)
        return
    with suppress(KeyboardInterrupt), Live(status_table(view_of(folder, run)), console=console, screen=False) as live:
        while True:
            time.sleep(_REFRESH_SECONDS)
            live.update(status_table(view_of(folder, run)), refresh=True)


def show_list(folder: Path, *, as_json: bool = False) -> None:
    """Print the nodes of a deployment.

    Args:
        folder: See `view_of`.
        as_json: Print JSON instead of a table.

    Raises:
        UserError: If the folder is not one of a deployment.
    """
    view = view_of(folder)
    if as_json:
        print(json_of(view))
    else:
        Console().print(list_table(view))
