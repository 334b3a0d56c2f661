"""The command `fedpriv audit`."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedpriv.cli.app import ConfigFile, DataRoot, Settings, app, picture
from fedpriv.cli.terminal import PAGE, say

if TYPE_CHECKING:
    from fedpriv.audit.run import Against
    from fedpriv.experiment.execution import LocalEngine


@app.command()
def audit(
    config: ConfigFile,
    canaries: Annotated[int, typer.Option(help="Number of planted clients.")] = 300,
    confidence: Annotated[float, typer.Option(help="Confidence level of the lower bound on epsilon.")] = 0.95,
    out: Annotated[Path | None, typer.Option(help="Output folder.", show_default="runs/NAME-audit")] = None,
    settings: Settings = None,
    engine: Annotated[str, typer.Option(help="auto (the fastest by measurement), loop or vectorized.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_root: DataRoot = None,
    audit_seed: Annotated[
        int, typer.Option(help="Seed of the planted clients; each seed gives a different attack.")
    ] = 0,
    against: Annotated[
        str, typer.Option(help="plan, or all-helpers: the server with all helpers of secure aggregation.")
    ] = "plan",
) -> None:
    """Test the claimed epsilon of an experiment by an attack with planted clients; exit code 1 if it is refuted."""
    from fedpriv.audit import AUDIT_FILE, PICTURE_FILE, AuditChoice, run_audit
    from fedpriv.experiment.config import load_config
    from fedpriv.experiment.progress import RoundProgress
    from fedpriv.privacy import rounded_up

    experiment = load_config(config, settings or ())
    directory = out or Path("runs") / f"{experiment.name}-audit"
    choice = AuditChoice(
        canaries=canaries,
        confidence=confidence,
        seed=audit_seed,
        engine=cast("LocalEngine", engine),
        device=device,
        against=cast("Against", against),
    )
    with RoundProgress(experiment.training.rounds) as progress:
        found = run_audit(
            experiment, directory, choice, data_root=data_root, watch=lambda number: progress({"round": number}, {})
        )
    level = f"{100 * found['confidence']:g} %"
    say(
        f"verdict     {found['verdict']}\n"
        f"claimed     epsilon {rounded_up(found['epsilon_claimed'])} at delta = {found['delta']:g}, "
        f"{found['adjacency']} adjacency\n"
        f"measured    at least {found['epsilon_lower']:.2f} at {level} confidence; estimate "
        f"{found['epsilon_estimate']:.2f}\n"
        f"adversary   {found['adversary']}\n"
        f"picture     {picture(directory / PICTURE_FILE)}\n"
        f"record      {directory / AUDIT_FILE}\n"
    )
    say(textwrap.fill(found["words"], width=PAGE), paragraphs=True)
    raise typer.Exit(1 if found["verdict"] == "guilty" else 0)
