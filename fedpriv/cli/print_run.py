"""Output of `fedpriv run`."""

from pathlib import Path

from fedpriv.cli.app import picture
from fedpriv.cli.terminal import say
from fedpriv.errors import UserError
from fedpriv.experiment.learned import learned_nothing, warnings_of
from fedpriv.experiment.progress import pace
from fedpriv.experiment.run_directory import DIAGNOSTICS_FILE, RunDirectory
from fedpriv.privacy import rounded_up
from fedpriv.tables import Record
from fedpriv.tasks.metrics import recorded_metrics

__all__ = ["print_summary", "print_warnings"]


def print_summary(summary: Record, directory: Path) -> None:
    """Print the results of a finished run.

    Args:
        summary: See `fedpriv.run_experiment`.
        directory: The run directory.
    """
    speed = pace(summary["clients_per_second"])
    metric, loss = recorded_metrics(summary)[0], summary["test_loss"]
    score, validated = (summary.get(f"{on}_{metric.name}") for on in ("test", "validation"))
    if summary["private"]:
        promise = f"{rounded_up(summary['epsilon'])} at delta = {summary['delta']:g}, {summary['adjacency']} adjacency"
        if "epsilon_spent" in summary:
            done = f"{summary['rounds']:,} of at most {summary['rounds_planned']:,} rounds"
            promise += f"\nspent       {rounded_up(summary['epsilon_spent'])} of it in {done}"
        together = (RunDirectory(directory).read_json("privacy.json") or {}).get("with_analyses")
        if together is not None:
            names = " and ".join(together["analyses"])
            promise += f"\nquote       {rounded_up(together['epsilon'])}, which includes {names}"
        promise += f"\nadversary   {summary['adversary']}"
    else:
        promise = "none: this run is not private"
    if validated is not None:
        unprotected = _mark(summary, f"validation_{metric.name}")
        say(f"validation  {validated:.4f} on the held-out examples, to choose by{unprotected}")
    say(
        f"{metric.name:11} {_number(score)} on the test set (loss {_number(loss)})"
        f"{_mark(summary, f'test_{metric.name}')}\n"
        f"epsilon     {promise}\n"
        f"{_clock_line(summary, directory)}"
        f"speed       {', '.join(filter(None, (speed, f'engine {_engine_line(summary)}')))}\n"
        f"picture     {picture(directory / 'curves.png')}\n"
        f"statement   {directory / 'privacy.txt'}"
    )


def print_warnings(directory: Path) -> None:
    """Print the warnings in the diagnostics of a run.

    Raises:
        UserError: If no update was finite, so that nothing was learned. The records are complete in that case, too.
    """
    rows = RunDirectory(directory).rows("diagnostics.jsonl")
    warnings = warnings_of(rows)
    if learned_nothing(rows):
        remedy = f"{warnings[0].removesuffix('.')}. Its records are in {directory}"
        raise UserError("the run", "updates of finite numbers", "only NaN or infinity", remedy)
    for warning in warnings:
        say(f"warning     {warning}", error=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _mark(summary: Record, score: str) -> str:
    """Return the warning for a score that is computed on the examples of protected clients; empty for other scores."""
    return "; NOT covered by epsilon: on the clients' own examples" if score in summary.get("not_covered", ()) else ""


def _clock_line(summary: Record, directory: Path) -> str:
    """Return the line on the simulated duration and traffic of a run; empty without a virtual clock."""
    unreleased = RunDirectory(directory).read_json(DIAGNOSTICS_FILE) or {}  # the clock may reveal who took part
    found = {**unreleased, **summary}
    if "simulated_seconds" not in found:
        return ""
    hours, rest = divmod(round(found["simulated_seconds"]), 3600)
    down, up = (found[key] / 1e6 for key in ("bytes_down", "bytes_up"))
    return f"clock       {hours} h {rest // 60} min {rest % 60} s, {down:.1f} MB down, {up:.1f} MB up (simulated)\n"


def _engine_line(summary: Record) -> str:
    """Return the engine that ran, with the measured times if it was chosen by measurement."""
    ran, line = summary["execution"], summary["engine"]
    if ran.get("workers", 1) > 1:
        line += f" with {ran['workers']} workers, {ran['compute']} inside"
    if ran.get("seconds_per_client"):
        each = ", ".join(f"{name} {1e3 * seconds:.2g}" for name, seconds in ran["seconds_per_client"].items())
        line += f" (measured, ms a client: {each})"
    return line
