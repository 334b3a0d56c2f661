"""Neighboring data: if one client changes all its data, nothing else that a run trains on may change.

Covers all data sets with natural clients, on files written by the tests, and all options of `[data]`.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import same
from support.natural_clients import CHANGED, KINDS

from fedpriv.data.dataset import DATASETS, Dataset, DatasetSource
from fedpriv.data.federation import Federation
from fedpriv.engines import LoopEngine
from fedpriv.experiment.build import assemble, make_federation, task_of
from fedpriv.experiment.config import Config, parse_config
from fedpriv.rounds import begin_round
from fedpriv.sweeps.tuning_score import UNITS, sum_of_scores

CHANGES = ("labels", "order", "values", "fewer", "more", "none")


def config_of(name: str, *, rounds: int = 1, **data: Any) -> Config:
    return parse_config(
        {
            "name": "neighbors",
            "seed": 3,
            "data": {"name": name, "partition": "natural", **{k: v for k, v in data.items() if v is not None}},
            "model": {"name": "softmax"},
            "method": {"name": "dp-fedavg", "clip_norm": 2.0},
            "privacy": {"epsilon": 8.0, "delta": 1e-5},
            "training": {"rounds": rounds},
        }
    )


@dataclasses.dataclass(frozen=True)
class Emptied:
    """A data set in which one natural client holds no examples, for files that cannot lose a client."""

    source: DatasetSource
    client: int

    def load(self, data_root: Path | None) -> Dataset:
        whole = self.source.load(data_root)
        assert whole.groups is not None
        kept = torch.from_numpy(np.flatnonzero(whole.groups != self.client))
        made: dict[str, Any] = {"train_inputs": whole.train_inputs[kept], "train_labels": whole.train_labels[kept]}
        made |= {"groups": whole.groups[kept.numpy()], "natural_clients": whole.natural_population}
        if whole.test_groups is not None:
            tested = torch.from_numpy(np.flatnonzero(whole.test_groups != self.client))
            made |= {"test_inputs": whole.test_inputs[tested], "test_labels": whole.test_labels[tested]}
            made["test_groups"] = whole.test_groups[tested.numpy()]
        return dataclasses.replace(whole, **made)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Return the files of every data set, before and after every change that files allow."""
    made = {}
    for name, kind in KINDS.items():
        for change in ("nothing", *CHANGES):
            if change == "none" and name != "tiny-shakespeare":
                continue
            made[name, change] = tmp_path_factory.mktemp("data")
            kind.write(made[name, change], kind.held() if change == "nothing" else kind.neighbor(change))
    return made


def federations(
    roots: dict[tuple[str, str], Path], name: str, change: str, config: Config
) -> tuple[Federation, Federation]:
    """Return results for the original data and for their neighbor."""
    neighbor = config
    if (name, change) not in roots:
        emptied = dataclasses.replace(config.data, dataset=Emptied(config.data.dataset, CHANGED))
        neighbor, change = dataclasses.replace(config, data=emptied), "nothing"
    before, after = make_federation(config, roots[name, "nothing"]), make_federation(neighbor, roots[name, change])
    assert isinstance(before, Federation)
    assert isinstance(after, Federation)
    return before, after


def held_by(federation: Federation, client: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(federation.rows_of(client))
    return federation.dataset.train_inputs[rows], federation.dataset.train_labels[rows]


def equal(one: Any, other: Any) -> bool:
    return (one is None) == (other is None) and (one is None or same(one, other))


def options_of(name: str) -> list[dict[str, Any]]:
    """Return all options of `[data]`; only one data set has public test examples."""
    return [
        {"test": test, "validation": validation, "shift": shift, "clients": clients}
        for test in (*(("public",) if name == "mnist-by-writer" else ()), "clients", "within")
        for validation, shift, clients in ((None, None, None), (0.3, None, None), (0.3, "noise", 2))
    ]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_a_clients_data_decide_about_no_other_clients_and_about_no_public_constant(
    name: str, change: str, roots: dict[tuple[str, str], Path]
) -> None:
    """Also for every score that is not marked as not covered."""
    noticed = 0
    for options in options_of(name):
        config = config_of(name, **options)
        before, after = federations(roots, name, change, config)
        assert before.population == after.population
        one, other = before.dataset, after.dataset
        assert (one.name, one.classes, one.input_shape) == (other.name, other.classes, other.input_shape)
        pairs = [(held_by(before, client), held_by(after, client)) for client in range(before.population)]
        changed = [i for i, (old, new) in enumerate(pairs) if not all(map(equal, old, new))]
        assert len(changed) <= 1, options
        if options["test"] != "clients":
            assert changed in ([], [CHANGED]), options
        noticed += len(changed)
        if changed:  # the client trains, and is protected
            covered = set(config.data.facts.not_covered)
            for on in ("test", "validation"):
                for part in ("inputs", "labels"):
                    alike = equal(getattr(one, f"{on}_{part}"), getattr(other, f"{on}_{part}"))
                    assert alike or f"{on}_accuracy" in covered, (on, options)
    assert noticed >= 3, "the change reaches the training data"


def test_every_data_set_with_natural_clients_is_put_to_the_test() -> None:
    """Those of users' own files are in `tests/data/test_data_user_files.py`; `words` only answers analyses."""
    others = ("user_files", "text.tokens", "text.words")
    users = {name for name, source in DATASETS.items() if source.__module__.endswith(others)}
    assert set(KINDS) == {name for name, source in DATASETS.items() if source.natural} - users


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
def test_the_bare_sum_of_messages_moves_by_no_more_than_the_sensitivity(
    name: str, change: str, roots: dict[tuple[str, str], Path]
) -> None:
    """Replacing a client moves the sum by 2 B, emptying it by B, also with examples held out for validation."""
    test = "within" if name != "mnist-by-writer" else "public"
    config = config_of(name, test=test, validation=0.1)
    sums, bounds = [], []
    for federation in federations(roots, name, change, config):
        experiment = assemble(config, federation=federation)
        assert experiment.plan is not None
        bounds.append(experiment.plan.l2_bound * (1.0 if change == "none" else 2.0))
        state = config.method.init_server(experiment.initial_model)
        broadcast = begin_round(experiment.server, state, 1)
        sums.append(LoopEngine(experiment.population).sum_messages(broadcast).sum.double())
    assert torch.linalg.vector_norm(sums[0] - sums[1]) <= bounds[0] * (1.0 + 1e-6)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.sampled
def test_the_sum_of_accuracies_moves_by_at_most_one_client_whatever_its_examples(
    name: str, change: str, roots: dict[tuple[str, str], Path]
) -> None:
    """For any model, also if a client's held-out examples appear or disappear; the divisor stays the same."""
    moves = []
    for options in options_of(name):
        config = config_of(name, **options)
        pair = federations(roots, name, change, config)
        task, datasets = task_of(config, pair[0], "cpu"), [federation.dataset for federation in pair]
        parts = {"test": [(d.test_inputs, d.test_labels, d.tested) for d in datasets]}
        parts |= {"validation": [(d.validation_inputs, d.validation_labels, d.validated) for d in datasets]}
        for seed, (one, other) in itertools.product(range(40), parts.values()):
            if one[2] is None or other[2] is None:
                assert one[2] is other[2]
                continue
            model = torch.randn(task.layout.size, generator=torch.Generator().manual_seed(seed))
            assert one[2].clients == other[2].clients
            found = [sum_of_scores(task, model, *part) for part in (one, other)]  # pyright: ignore[reportArgumentType]
            assert all(0 <= total <= UNITS * one[2].clients for total in found)
            moves.append(abs(found[0] - found[1]))
    assert 0 < max(moves) <= UNITS


def test_a_client_counts_with_its_share_of_right_answers_however_many_examples_it_has(
    roots: dict[tuple[str, str], Path],
) -> None:
    """A client's examples also pass through the model separately."""
    config = config_of("mnist-by-writer", test="within")
    experiment = assemble(config, data_root=roots["mnist-by-writer", "nothing"])
    dataset, task = experiment.population.federation.dataset, experiment.population.task
    assert dataset.tested is not None
    model = torch.randn(task.layout.size, generator=torch.Generator().manual_seed(1))
    right = (task.logits(model, dataset.test_inputs).argmax(dim=1) == dataset.test_labels).numpy()
    owners = dataset.tested.owners
    shares = [right[owners == client].mean() for client in np.unique(owners)]
    assert len(set(np.bincount(owners).tolist())) > 1
    total = sum_of_scores(task, model, dataset.test_inputs, dataset.test_labels, dataset.tested)
    assert 0.0 < sum(shares) - total / UNITS + 1e-9 < dataset.tested.clients / UNITS


def test_a_client_without_data_sends_zeros(roots: dict[tuple[str, str], Path]) -> None:
    config = config_of("tiny-shakespeare", test="within")
    _, emptied = federations(roots, "tiny-shakespeare", "none", config)
    assert emptied.sizes[CHANGED] == 0
    experiment = assemble(config, federation=emptied)
    assert not experiment.population.signal(CHANGED, experiment.initial_model, 1).any()
