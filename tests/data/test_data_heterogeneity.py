import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fedpriv.data.datasets import Digits
from fedpriv.data.federation import federate
from fedpriv.data.heterogeneity import evenly_chosen, gini, gradient_metrics, size_metrics
from fedpriv.data.partitions import Dirichlet, Iid, Partition
from fedpriv.tasks.models import MODELS, Softmax
from fedpriv.tasks.task import Task


def test_few_clients_are_all_chosen_and_many_evenly():
    assert evenly_chosen(3, 200).tolist() == [0, 1, 2]
    assert evenly_chosen(1, 200).tolist() == [0]
    assert evenly_chosen(101, 5).tolist() == [0, 25, 50, 75, 100]
    many = evenly_chosen(1_000_003, 200)
    assert (len(many), many[0], many[-1]) == (200, 0, 1_000_002)
    assert np.ptp(np.diff(many)) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=30))
def test_gini_is_the_mean_difference_over_twice_the_mean(sizes):
    held = np.array(sizes)
    expected = np.abs(held[:, None] - held[None, :]).mean() / (2 * held.mean())
    assert gini(held) == pytest.approx(expected, abs=1e-12)
    assert gini(held[::-1]) == pytest.approx(gini(7 * held), abs=1e-12)


def test_size_figures_of_known_sizes():
    found = size_metrics(np.array([1, 1, 4]))
    assert (found["size_min"], found["size_median"], found["size_max"]) == (1, 1.0, 4)
    assert found["size_variation"] == pytest.approx(np.sqrt(2) / 2)
    assert found["size_gini"] == pytest.approx(1 / 3)


def test_gradient_figures_of_known_gradients():
    """g = (1, 0), each at distance 2 from it."""
    found = gradient_metrics([torch.tensor([1.0, 2.0]), torch.tensor([1.0, -2.0])])
    assert found == pytest.approx({"gradient_norm": 1.0, "gradient_spread": 2.0, "gradient_dissimilarity": 2.0})


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_dissimilarity_is_fedproxs_and_forgets_scale_order_and_copies(seed, clients, scale):
    gradients = torch.from_numpy(np.random.default_rng(seed).normal(1.0, 1.0, (clients, 5))).float()
    found = gradient_metrics(gradients)["gradient_dissimilarity"]
    exact = gradients.double()
    squared = float((exact**2).sum(dim=1).mean() / (exact.mean(dim=0) ** 2).sum())
    assert found == pytest.approx(np.sqrt(max(squared - 1.0, 0.0)), rel=1e-6, abs=1e-6)
    for same in (gradients.flip(0), scale * gradients, torch.cat([gradients, gradients])):
        assert gradient_metrics(same)["gradient_dissimilarity"] == pytest.approx(found, rel=1e-4, abs=1e-6)


def test_clients_that_agree_have_no_dissimilarity_and_opposites_have_no_ratio():
    gradient = torch.tensor([1e4, 1e-4, 3.0])
    assert gradient_metrics([gradient] * 50)["gradient_dissimilarity"] < 1e-12
    assert np.isnan(gradient_metrics([gradient, -gradient])["gradient_dissimilarity"])


@pytest.mark.parametrize("name", ["softmax", "mlp", "cnn", "resnet20"])
def test_operations_are_those_of_pytorchs_own_counter(name):
    task, inputs = Task(MODELS[name]().build((3, 12, 8), 10, 0)), torch.zeros(2, 3, 12, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.logits(task.initial_model(), inputs)
    assert task.operations(inputs) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_gradients_differ_more_as_labels_do():
    digits = Digits().load(None)
    task = Task(Softmax().build(digits.input_shape, 10, 0))

    def dissimilarity(rule: Partition) -> float:
        federation = federate(digits, rule, 20, np.random.default_rng(0))
        rows = [torch.from_numpy(federation.rows_of(client)) for client in range(20)]
        gradients = (
            task.gradient(task.initial_model(), digits.train_inputs[at], digits.train_labels[at]) for at in rows
        )
        return gradient_metrics(gradients)["gradient_dissimilarity"]

    iid, mild, strong = map(dissimilarity, (Iid(), Dirichlet(concentration=1.0), Dirichlet(concentration=0.1)))
    assert iid < mild < strong
