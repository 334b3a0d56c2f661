"""The command `fedpriv check`."""

import shlex
from typing import Annotated

import typer

from fedpriv.cli.app import ConfigFile, DataRoot, Settings, app
from fedpriv.cli.terminal import say

_PREDICTED = {
    "classes": "labels",
    "numbers": "number to predict",
    "flags": "labels, any number of them",
    "tokens": "tokens",
}


@app.command()
def check(
    config: ConfigFile,
    settings: Settings = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    data_root: DataRoot = None,
) -> None:
    """Check an experiment in seconds: load everything it names and let one client compute one step."""
    from fedpriv.errors import plural
    from fedpriv.experiment.config import load_config
    from fedpriv.experiment.dry_run import try_experiment
    from fedpriv.privacy import rounded_up

    experiment = load_config(config, settings or ())
    found = try_experiment(experiment, device=device, data_root=data_root)
    shape = " x ".join(map(str, found.input_shape)) or "one number"
    numbers = dict.fromkeys(f"{number:,}" for number in (found.fewest, found.most) if number is not None)
    held = f", {' to '.join(numbers)} examples each" if numbers else ""
    say(f"data        {found.examples:,} examples to train on, {found.test_examples:,} to test on; inputs {shape}")
    say(f"clients     {found.clients:,}{held}; {found.classes:,} {_PREDICTED[experiment.task.labels]}")
    say(f"model       {found.parameters:,} trainable parameters, first loss {found.loss:.4g}")
    say(f"signal      of norm {found.signal_norm:.4g}, computed by one client")
    if found.epsilon is None:
        say("privacy     none")
    else:
        rounds, most = experiment.training.rounds, "" if experiment.controller is None else "at most "
        after = f"{most}{rounds:,} {plural('round', rounds)}"
        say(f"epsilon     {rounded_up(found.epsilon)} at delta = {found.delta:g} after {after}")
    for key, source in found.sources.items():
        say(f"source      {key}: " + ", ".join(f"{part} {text[:12]}" for part, text in source.items()))
    for warning in found.warnings:
        say(f"warning     {warning}", error=True)
    command = "run" if experiment.learns else "analyze"
    again = ["fedpriv", command, str(config), *(part for setting in settings or () for part in ("-s", setting))]
    if data_root is not None:
        again += ["--data-root", str(data_root)]
    if device != "cpu":
        again += ["--device", device]
    say(f"next        {shlex.join(again)}")
