"""Running other people's Flower apps."""

from pathlib import Path
from typing import Annotated

import typer

from fedpriv.cli.app import app
from fedpriv.errors import require_extra


@app.command()
def flower(
    app_dir: Annotated[Path, typer.Argument(metavar="APP_DIR", help="The Flower app's folder.", show_default=False)],
    clients: Annotated[int, typer.Option(help="How many clients: partition ids 0 to N - 1.", show_default=False)],
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "-c", "--run-config", metavar="key=value", help="Change a key of the app's config, as flwr run does."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes that run clients; above 1, Ray's.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option(help="Each worker's share of a GPU, such as 0.25.")] = 0.0,
    ray_address: Annotated[
        str, typer.Option(help="A Ray cluster's HOST:PORT or auto; else a Ray of the run's own.", show_default=False)
    ] = "",
) -> None:
    """Run a Flower app as it is, without Flower's servers. What it writes under relative names lands where you are."""
    require_extra("fedpriv flower", "flower", ["flwr"])
    from fedpriv.flower.apps.run import Workers, run_app

    asked = Workers(workers, gpus_per_worker, ray_address)
    if asked.need_ray:
        require_extra("fedpriv flower --workers", "flower")
    print(run_app(app_dir, clients, run_config or (), asked))
