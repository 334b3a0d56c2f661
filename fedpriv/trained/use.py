"""Scores and predictions of a trained model."""

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from fedpriv.errors import UserError
from fedpriv.experiment.build import make_federation
from fedpriv.experiment.config import load_config
from fedpriv.plugins import MEMORY
from fedpriv.tasks.task import MAX_PIECE_FLOATS, Task
from fedpriv.trained.inputs import read_examples
from fedpriv.trained.module import Trained

__all__ = ["evaluate", "outputs_of", "predictions"]


def evaluate(
    trained: Trained, data: Path | None = None, *, data_root: Path | None = None, prepared: bool = False
) -> dict[str, float]:
    """Return the loss and the metrics of a trained model, by name.

    Args:
        trained: The run.
        data: A file with examples, see `fedpriv.trained.inputs.read_examples`; None for the run's own test examples.
        data_root: The folder of the data sets, for the run's own test examples.
        prepared: True if the inputs in `data` are scaled already.

    Raises:
        UserError: If the examples cannot be loaded, or do not suit the run.
    """
    if data is None:
        inputs, labels = _own_tests(trained, data_root)
    else:
        inputs, labels = read_examples(trained, data, prepared=prepared)
    task = Task(trained.module, kind=trained.task)
    return task.evaluate(task.initial_model(), inputs, labels)


def _own_tests(trained: Trained, data_root: Path | None) -> tuple[Tensor, Tensor]:
    names = {name: trained.tables[name].get("name") for name in ("data", "model")}
    held = [f"{name}.name = {value!r}" for name, value in names.items() if str(value).startswith(f"{MEMORY}:")]
    if held:
        expected = "a file with examples, because the run used objects of a Python program"
        raise UserError("--data", expected, held[0], "Give --data FILE.npz with inputs and labels")
    dataset = make_federation(load_config(trained.path / "config.toml"), data_root).dataset
    return dataset.test_inputs, dataset.test_labels


def outputs_of(trained: Trained, inputs: Tensor) -> Tensor:
    """Return the model's outputs `[examples, ...]`, such as logits, on prepared inputs `[examples, *input_shape]`."""
    size = max(MAX_PIECE_FLOATS // max(inputs[0].numel(), 1), 1)
    with torch.no_grad():
        return torch.cat([trained.module(piece) for piece in inputs.split(size)])


def predictions(trained: Trained, inputs: Tensor) -> pd.DataFrame:
    """Return one row of predictions for each prepared input.

    Args:
        trained: The run.
        inputs: float32 `[examples, *input_shape]`, prepared.

    Returns:
        For classes: `label`, `name` if names are declared, and `probability`, the highest. For several labels: the
        probability of each. For numbers: the values, in the unit of the labels. For tokens: the token at each position.
    """
    found = trained.task.predictions(outputs_of(trained, inputs))
    names, kind = trained.class_names, trained.task.labels
    if kind == "classes":
        highest, label = found.max(dim=-1)
        table = pd.DataFrame({"label": label.numpy()})
        if names is not None:
            table["name"] = [names[at] for at in label.tolist()]
        table["probability"] = highest.numpy()
        return table
    values = found.argmax(dim=-1) if kind == "tokens" else found
    flat = values.reshape(len(values), -1).numpy()
    word = {"tokens": "token", "flags": "label", "numbers": "value"}[kind]
    if kind != "flags" or names is None:
        names = [word] if flat.shape[1] == 1 else [f"{word}_{at}" for at in range(flat.shape[1])]
    return pd.DataFrame(flat, columns=names)
