"""Command line `fedpriv COMMAND`; each module defines some of the commands."""

import itertools
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from fedpriv.cli.app import app
from fedpriv.cli.terminal import log_to_terminal, say
from fedpriv.errors import UserError
from fedpriv.plugins import own_frames

from fedpriv.cli import run, analyses, check, sweep, audit, flower, deploy, privacy, data, trained  # isort: skip
from fedpriv.cli.operate import commands  # isort: skip

__all__ = ["app", "main"]

# `--help` lists the commands in the order of these imports.
_COMMANDS = (run, analyses, check, sweep, audit, flower, deploy, commands, privacy, data, trained)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A `UserError` becomes one line on stderr and exit code 2."""
    log_to_terminal()
    given = sys.argv[1:] if arguments is None else arguments
    _refuse_empty_paths(given)
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into this exit code
            raise KeyboardInterrupt
    except UserError as error:
        _fail(str(error))
    except click.ClickException as error:
        line = " ".join(error.format_message().split())
        _fail(re.sub(r"( Did you mean [^?]*\?)\1", r"\1", line))  # typer's suggestion, and click's
    except (KeyboardInterrupt, click.Abort):
        say("fedpriv: stopped. Add --resume to continue a run from its last checkpoint.", error=True)
        raise SystemExit(130) from None
    except OSError as error:
        where = error.filename or ("standard output" if _is_of_output(error) else "file system")
        resumed = "; add --resume to continue" if given[:1] in (["run"], ["sweep"]) else ""
        remedy = f"Correct the path, its permissions or the disk, and run again{resumed}"
        _fail(f"{where}: {error.strerror or error}. {remedy}")
    except Exception as error:
        frames = own_frames(error)
        if not frames:
            raise
        say("".join(traceback.format_list(frames)).rstrip(), error=True)
        reason = " ".join("".join(traceback.format_exception_only(error)).split())
        _fail(
            f"{frames[0].filename}, line {frames[0].lineno}: expected code that runs, got {reason}. Correct the file."
        )
    else:
        raise SystemExit(code if isinstance(code, int) else 0)


def _refuse_empty_paths(given: Sequence[str]) -> None:
    """Fail if an option's path is empty, such as an unset variable of a shell: it would be the current folder."""
    for option in ("--out", "--data-root"):
        if f"{option}=" in given or any(pair == (option, "") for pair in itertools.pairwise(given)):
            _fail(f"{option}: expected a path, got an empty text. Name a file or folder, or remove {option}.")


def _is_of_output(error: OSError) -> bool:
    """Return True for an error of the standard output, as into a file on a full disk."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).parent.name in ("cli", "click", "rich", "typer")


def _fail(line: str) -> None:
    say(f"fedpriv: {line}", error=True)
    raise SystemExit(2) from None
