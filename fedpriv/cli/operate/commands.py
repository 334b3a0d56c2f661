"""The commands `fedpriv deploy health, rotate, backup` and `restore`."""

import math
from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.deploy import deploy
from fedpriv.cli.terminal import say
from fedpriv.errors import UserError

rotate = typer.Typer(help="Replace the key of a node or a helper, and keep its ledger.", no_args_is_help=True)
deploy.add_typer(rotate, name="rotate")

PartyDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder of the server, the node or the helper.", show_default=False)
]
NodeDir = Annotated[
    Path, typer.Argument(metavar="NODE_DIR", help="Folder of the node or the helper.", show_default=False)
]


@deploy.command()
def health(folder: PartyDir) -> None:
    """Exit with 0 if a server answers, or a node is connected; otherwise with 1, for health checks of containers."""
    from fedpriv.deploy.operate.health import health

    try:
        say(health(folder))
    except UserError as error:
        say(f"fedpriv: {error}", error=True)
        raise typer.Exit(1) from None


@rotate.command()
def key(folder: NodeDir) -> None:
    """Make a new key beside the one in use, and a handover for the server's administrator."""
    from fedpriv.deploy.operate.rotation import begin_rotation

    file = begin_rotation(folder)
    say(
        f"made        {file}\nnext        send it to the server's administrator for fedpriv deploy rotate accept\n"
        f"then        stop the node, run fedpriv deploy rotate finish {folder}, and start it\n"
        "at last     once it is connected, run finish again; it deletes the old key"
    )


@rotate.command()
def accept(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Handover of the node.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the deployment, or admin in it.")] = Path(),
) -> None:
    """Register the new key of a handover, and remove the old one."""
    from fedpriv.deploy.operate.rotation import accept_handover

    say(accept_handover(file, folder))


@rotate.command()
def finish(
    folder: NodeDir,
    force: Annotated[
        bool, typer.Option("--force", help="Delete the old key even if the server has not accepted the new one.")
    ] = False,
) -> None:
    """Put the new key of a stopped node in use. Run again once it has connected, to delete the old key."""
    from fedpriv.deploy.operate.rotation import finish_rotation

    say(finish_rotation(folder, force=force))


@deploy.command()
def backup(
    folder: PartyDir,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New tar file.", show_default=False)],
) -> None:
    """Copy the folder of a server, a stopped node or a stopped helper. The copy holds its keys."""
    from fedpriv.deploy.operate.backup import back_up

    say(back_up(folder, file))


@deploy.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File from fedpriv deploy backup.", show_default=False)],
    folder: PartyDir,
    heads: Annotated[
        Path | None,
        typer.Option(help="For a node: newest client-heads.json of the server, as proof.", show_default=False),
    ] = None,
    charge: Annotated[
        str | None,
        typer.Option(
            metavar="EPSILON|all",
            help="For a node, without proof: epsilon that was spent since the copy at most, or all of the budget.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Restore a copy. That of a node needs proof that its ledger is the newest, or a charge for missing releases."""
    from fedpriv.deploy.operate.backup import restore

    say(restore(file, folder, heads, _charge(charge)))


def _charge(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = math.inf if text == "all" else float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or (math.isinf(value) and text != "all"):
        raise UserError("--charge", "a number above 0, or all", repr(text), "Give the maximum spent since the copy")
    return value
