"""The model card: the data, the method, epsilon with its adversary, the metrics and the limits of a trained model.

It is made from released files of the run directory alone.
"""

import json
from collections.abc import Mapping

from fedpriv.errors import UserError
from fedpriv.plugins import bare_reference
from fedpriv.privacy import rounded_up
from fedpriv.tables import Record, Table
from fedpriv.trained.module import Trained

__all__ = ["model_card"]

_TAGS = ("federated-learning", "differential-privacy", "fedpriv")


def model_card(trained: Trained, file: str, how: str) -> str:
    """Return the card in Markdown, with the front matter of model hubs.

    Args:
        trained: The run.
        file: Name of the file with the model, beside the card.
        how: Python code that loads the file.

    Raises:
        UserError: If the run directory lacks the summary or the promise.
    """
    summary, promise = (_required(trained, name) for name in ("summary.json", "privacy.json"))
    parts = [
        _front_matter(trained),
        f"# {trained.tables['name']}\n",
        _model(trained, summary, file, how),
        _data(trained, summary),
        _method(trained, summary),
        _privacy(promise),
        _metrics(summary),
        _limits(promise),
        f"## Privacy statement\n\n```text\n{str(promise['statement']).strip()}\n```\n",
    ]
    return "\n".join(parts)


def _required(trained: Trained, name: str) -> Record:
    found = trained.record(name)
    if not found:
        remedy = "Finish the run with fedpriv run ... --resume"
        raise UserError(str(trained.path / name), "a file of a finished run", "a missing one", remedy)
    return found


def _front_matter(trained: Trained) -> str:
    tags = "".join(f"- {tag}\n" for tag in _TAGS)
    name = json.dumps(f"{trained.tables['name']}")
    return f"---\nlibrary_name: pytorch\nmodel_name: {name}\ntags:\n{tags}---\n"


def _model(trained: Trained, summary: Record, file: str, how: str) -> str:
    shape = ", ".join(map(str, ("batch", *trained.input_shape)))
    lines = [
        f"`{file}` holds the model {_settings(trained.tables['model'])}; {summary['parameters']:,} parameters were "
        "trained.",
        f"It maps float32 inputs `[{shape}]` to outputs of width {trained.facts['outputs']}.",
        _inputs(trained.facts["inputs"]),
    ]
    if "adapter" in trained.tables:
        kind = _settings({"name": trained.tables["adapter"]["kind"], **trained.tables["adapter"]}, ("kind",))
        lines.insert(1, f"They are adapters, {kind}; all other weights are those of the model before.")
    if trained.class_names is not None:
        lines.append(f"The outputs stand for: {', '.join(map(repr, trained.class_names))}.")
    return "## Model\n\n" + "\n".join(lines) + f"\n\n```python\n{how.strip()}\n```\n"


def _inputs(constants: Record) -> str:
    if constants["columns"] is not None:
        return "Inputs are the columns in `model.json`, scaled and encoded by the declared constants there."
    if (constants["scale"], constants["mean"], constants["std"]) == (1.0, [], []):
        return "Inputs are used as the loader of the data set gives them."
    mean, std = constants["mean"] or "0", constants["std"] or "1"
    return (
        f"Inputs are (value / {constants['scale']:g} - mean) / std per channel, mean {mean} and std {std}: constants "
        "that the data set declares, not statistics of clients' data."
    )


def _data(trained: Trained, summary: Record) -> str:
    data = trained.tables["data"]
    name, clients = bare_reference(data["name"]), f"{summary['population']:,} clients"
    words = f"`{name}`, divided among {clients} (partition `{bare_reference(data['partition'])}`)."
    return f"## Data\n\n{words} No client's data are in this folder.\n"


def _method(trained: Trained, summary: Record) -> str:
    name, cohort, digest = _settings(trained.tables["method"]), summary["expected_cohort"], summary["digest"][:16]
    words = (
        f"{name} for {summary['rounds']:,} rounds, with {cohort:g} clients expected in a round. `config.toml` of "
        f"the run (digest `{digest}`) has all settings."
    )
    return f"## Method\n\n{words}\n"


def _privacy(promise: Record) -> str:
    if not promise["private"]:
        return "## Privacy\n\nNone: this model was trained without differential privacy. It may reveal training data.\n"
    epsilon = "infinity" if promise["epsilon"] is None else rounded_up(promise["epsilon"])
    rows = {
        "epsilon": f"{epsilon} at delta = {promise['delta']:g}",
        "adversary": promise["adversary"],
        "protects": f"one {promise['unit']} ({promise['adjacency']}), over the whole run",
        "who adds the noise": f"trust `{promise['trust']}`",
        "accountant": promise["accountant"],
    }
    lines = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return f"## Privacy\n\n| | |\n|---|---|\n{lines}"


def _metrics(summary: Record) -> str:
    scores = {key: value for key, value in summary.items() if key.startswith(("test_", "validation_"))}
    lines = "".join(
        f"| `{key}` | {'none' if value is None else f'{value:.4g}'} | {_covered(key, summary)} |\n"
        for key, value in scores.items()
    )
    return f"## Metrics\n\n| score | value | covered by epsilon |\n|---|---|---|\n{lines}"


def _covered(key: str, summary: Record) -> str:
    if not summary["private"]:
        return "no epsilon"
    if key in summary.get("not_covered", ()):
        return "no: computed on protected clients' examples, without noise"
    return "yes: not computed on protected clients' examples"


def _limits(promise: Record) -> str:
    limits = []
    if promise["private"]:
        limits += [
            "Epsilon is about the adversary above. It says nothing about anyone who sees more.",
            "Hyperparameters chosen on clients' data are not covered.",
            "In a simulation the noise follows from a seed, and anyone with it can subtract the noise: see below.",
        ]
    limits += [
        "The scores are of the test examples above, and may differ for other people or other times.",
        "This model has not been checked for fairness, safety or a particular use.",
    ]
    return "## Limits\n\n" + "".join(f"* {limit}\n" for limit in limits)


def _settings(table: Table, hidden: tuple[str, ...] = ()) -> str:
    """Return a table's name with its other keys, as `name(key=value)`."""
    others = ", ".join(f"{key}={_shown(value)}" for key, value in table.items() if key not in ("name", *hidden))
    name = bare_reference(table["name"])
    return f"`{name}({others})`" if others else f"`{name}`"


def _shown(value: object) -> str:
    return json.dumps(dict(value) if isinstance(value, Mapping) else value)
