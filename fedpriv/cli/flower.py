"""The command `fedpriv flower`."""

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.app import app
from fedpriv.errors import require_extra


@app.command()
def flower(
    app_dir: Annotated[Path, typer.Argument(metavar="APP_DIR", help="Folder of the Flower app.", show_default=False)],
    clients: Annotated[int, typer.Option(help="Number of clients N: partition ids 0 to N - 1.", show_default=False)],
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "-c", "--run-config", metavar="key=value", help="Override a key of the app's run config, as flwr run does."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Number of processes that run clients; above 1, they are Ray actors.")
    ] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="Share of a GPU for each worker, such as 0.25.")] = 0.0,
    ray_address: Annotated[
        str,
        typer.Option(help="HOST:PORT of a Ray cluster, or auto.", show_default="start Ray for this run"),
    ] = "",
) -> None:
    """Run a Flower app unchanged, without Flower's servers. Its relative paths start at the current directory."""
    require_extra("fedpriv flower", "flower", ["flwr"])
    from fedpriv.flower.apps.run import Workers, run_app

    asked = Workers(workers, gpus_per_worker, ray_address)
    if asked.need_ray:
        require_extra("fedpriv flower --workers", "flower")
    print(run_app(app_dir, clients, run_config or (), asked))
