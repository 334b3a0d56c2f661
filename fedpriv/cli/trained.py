"""The commands `fedpriv export`, `fedpriv evaluate` and `fedpriv predict`, for finished runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedpriv.cli.app import DataRoot, app

if TYPE_CHECKING:
    from fedpriv.trained.export import Format

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", show_default=False)]
Prepared = Annotated[bool, typer.Option("--prepared", help="The inputs in the file are scaled already.")]


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="state-dict, safetensors, torch-export, onnx, hf or peft.")],
    out: Annotated[Path | None, typer.Option(help="A new or empty folder.", show_default="RUN-FORMAT")] = None,
    data_root: DataRoot = None,
) -> None:
    """Write the trained model of a run in another format, with a model card."""
    from fedpriv.trained.export import export_model, is_plain

    written = export_model(run, cast("Format", to), out, data_root=data_root)
    print(f"model  {written}\ncard   {written.with_name('README.md')}")
    if to == "hf" and is_plain(written.parent):
        print("note   a plain folder: the model is not one of transformers, so from_pretrained cannot load it")


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=".npz with inputs and labels, or .csv.", show_default="the run's test data"),
    ] = None,
    prepared: Prepared = False,
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score the trained model of a run on its test examples, or on those of a file."""
    from fedpriv.trained.module import load_trained
    from fedpriv.trained.use import evaluate as scores_of

    trained = load_trained(run, data_root=data_root)
    found = scores_of(trained, data, data_root=data_root, prepared=prepared)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<12}{value:.6g}")
    if data is None and trained.record("summary.json").get("not_covered"):
        print("not covered by epsilon: these scores are computed on protected clients' examples, without noise")


@app.command()
def predict(
    run: Run,
    inputs: Annotated[Path, typer.Option(metavar="FILE", help=".npz, .npy or .csv.", show_default=False)],
    out: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write the rows to this file.")] = None,
    prepared: Prepared = False,
    data_root: DataRoot = None,
) -> None:
    """Print the predictions of the trained model of a run for the inputs of a file, as CSV."""
    from fedpriv.files import write_atomically
    from fedpriv.trained.inputs import read_inputs
    from fedpriv.trained.module import load_trained
    from fedpriv.trained.use import predictions

    trained = load_trained(run, data_root=data_root)
    rows = predictions(trained, read_inputs(trained, inputs, prepared=prepared)).to_csv(index=False)
    if out is None:
        print(rows, end="")
    else:
        write_atomically(out, rows)
        print(f"predictions  {out}")
