"""The command line, `fedpriv COMMAND`: each module holds some of the commands."""

import sys

import click

from fedpriv.cli.app import app
from fedpriv.errors import UserError

from fedpriv.cli import run, check, sweep, audit, flower, deploy, privacy, data  # isort: skip

__all__ = ["app", "main"]

# The order in which they are imported is the order of the help.
_COMMANDS = (run, check, sweep, audit, flower, deploy, privacy, data)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a mistake of the user's is one line on stderr and exit code 2."""
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except UserError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()))
    except (KeyboardInterrupt, click.Abort):
        print("fedpriv: stopped. Runs in process go on from the last checkpoint with --resume.", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        where = error.filename or "file system"
        _fail(f"{where}: {error.strerror or error}. Mend it and run again; a run goes on with --resume")
    else:
        raise SystemExit(code if isinstance(code, int) else 0)


def _fail(line: str) -> None:
    print(f"fedpriv: {line}", file=sys.stderr)
    raise SystemExit(2) from None
