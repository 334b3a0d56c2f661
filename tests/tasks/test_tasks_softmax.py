"""Softmax regression in C: torch's gradients for every shape, or torch itself."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fedpriv.native import native_library
from fedpriv.tasks import dense, native
from fedpriv.tasks.dense import DenseLayers
from fedpriv.tasks.models import Softmax
from fedpriv.tasks.native import SoftmaxInC, agrees, softmax_in_c
from fedpriv.tasks.task import Task

in_c = pytest.mark.skipif(softmax_in_c() is None, reason="no C compiler")
# Clients, examples, width and classes.
SHAPES = (
    (1, 1, 1, 1),
    (2, 1, 64, 10),
    (3, 15, 64, 10),
    (2, 16, 784, 10),
    (2, 33, 31, 4),
    (3, 17, 15, 5),
    (3, 23, 200, 13),
    (2, 7, 112, 10),
    (2, 5, 1025, 11),
    (1, 18, 2060, 2),
    (1, 2, 3, 64),
    (0, 4, 3, 2),
    (2, 0, 3, 2),
)


@pytest.fixture
def without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "softmax_in_c", lambda: None)


def problem(clients: int, examples: int, width: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return models `[clients, params]`, inputs, labels and weights."""
    generator = torch.Generator().manual_seed(clients + examples + width + classes)
    models = 0.3 * torch.randn((clients, classes * (width + 1)), generator=generator)
    inputs = torch.randn((clients, examples, width), generator=generator)
    labels = torch.randint(classes, (clients, examples), generator=generator)
    return models, inputs, labels, torch.rand((clients, examples), generator=generator)


def of_c(models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    found = SoftmaxInC(compiled()).gradients(models, inputs, labels, weights)
    assert found is not None
    return found


def compiled() -> ctypes.CDLL:
    library = native_library(native._SOURCE, native._declare)
    assert library is not None
    return library


def of_torch(models: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the gradients by differentiation in float64."""
    width = inputs.shape[2]
    classes, rows = models.shape[-1] // (width + 1), []
    for i in range(len(inputs)):
        model = models[i if models.dim() == 2 else slice(None)].double().requires_grad_()
        outputs = inputs[i].double() @ model[: classes * width].view(classes, width).T + model[classes * width :]
        losses = torch.nn.functional.cross_entropy(outputs, labels[i], reduction="none")
        rows.append(torch.autograd.grad((losses * weights[i]).sum(), model)[0])
    return torch.stack(rows) if rows else torch.zeros(models.shape, dtype=torch.float64)


@in_c
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_torch(shape: tuple[int, int, int, int]) -> None:
    models, inputs, labels, weights = problem(*shape)
    for chosen in (models, models[0]) if len(models) else (models,):
        found, expected = of_c(chosen, inputs, labels, weights), of_torch(chosen, inputs, labels, weights)
        assert found.shape == expected.shape
        lengths = torch.linalg.vector_norm(expected, dim=1)
        assert bool((torch.linalg.vector_norm(found - expected, dim=1) <= 1e-6 * lengths).all())


@in_c
def test_data_in_any_order_of_memory_are_read_as_they_are() -> None:
    models, inputs, labels, weights = problem(3, 7, 12, 4)
    expected = of_c(models, inputs, labels, weights)
    turned = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (models, inputs, labels, weights)]
    assert not any(tensor.is_contiguous() for tensor in turned)
    assert torch.equal(of_c(turned[0], turned[1], turned[2], turned[3]), expected)
    shifted = torch.cat([torch.zeros(1), inputs.flatten()])[1:].view_as(inputs)
    assert torch.equal(of_c(models, shifted, labels, weights), expected)


@in_c
def test_a_clients_bits_depend_on_no_other_client_and_no_padding() -> None:
    models, inputs, labels, weights = problem(4, 20, 40, 10)
    weights[1, 13:], weights[3] = 0.0, 0.0
    together = of_c(models, inputs, labels, weights)
    for i, examples in enumerate((20, 13, 20, 0)):
        own = [tensor[i : i + 1, :examples].contiguous() for tensor in (inputs, labels, weights)]
        assert torch.equal(of_c(models[i], own[0], own[1], own[2])[0], together[i])
    assert not together[3].any()


@in_c
def test_examples_of_weight_zero_between_others_count_nothing() -> None:
    models, inputs, labels, weights = problem(1, 40, 9, 3)
    weights[0, ::2] = 0.0
    used = [tensor[:, 1::2].contiguous() for tensor in (inputs, labels, weights)]
    expected = of_torch(models, used[0], used[1], used[2])
    assert torch.allclose(of_c(models, inputs, labels, weights).double(), expected, rtol=0.0, atol=1e-6)


@in_c
@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e4, 1e30])
def test_logits_of_any_size_are_those_of_torch(scale: float) -> None:
    models, inputs, labels, weights = problem(2, 19, 24, 10)
    inputs *= scale
    found, expected = of_c(models, inputs, labels, weights), of_torch(models, inputs, labels, weights)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=2e-5 * scale)


@in_c
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["input", "model"])
def test_numbers_that_are_not_finite_reach_their_own_client_alone(bad: float, place: str) -> None:
    models, inputs, labels, weights = problem(3, 18, 20, 10)
    expected = of_c(models, inputs, labels, weights)
    (inputs[1, 4] if place == "input" else models[1])[5] = bad
    found = of_c(models, inputs, labels, weights)
    assert not torch.isfinite(found[1]).all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


@in_c
def test_bad_labels_and_other_formats_are_left_to_torch() -> None:
    models, inputs, labels, weights = problem(2, 5, 3, 4)
    form = SoftmaxInC(compiled())
    for wrong in (-1, 4, 2**40):
        bad = labels.clone()
        bad[1, 2] = wrong
        assert form.gradients(models, inputs, bad, weights) is None
    assert form.gradients(models.double(), inputs, labels, weights) is None
    assert form.gradients(models, inputs.double(), labels, weights) is None
    assert form.gradients(models, cast(Any, torch)._neg_view(inputs), labels, weights) is None
    assert form.gradients(models, inputs, labels.int(), weights) is None
    assert form.gradients(models, inputs, labels, weights.double()) is None
    assert form.gradients(torch.zeros(65 * 4), inputs, labels, weights) is None  # 65 classes
    with pytest.raises(RuntimeError, match="index"):
        DenseLayers(((4, 3),)).gradients(models, inputs, torch.full_like(labels, 4), weights)


@in_c
@pytest.mark.usefixtures("without_c")
def test_a_task_takes_torch_without_it_and_agrees() -> None:
    task = Task(Softmax().build((1, 8, 8), 10, 0))
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn((4, 6, 1, 8, 8), generator=generator), torch.randint(10, (4, 6), generator=generator)
    weights, model = torch.full((4, 6), 1.0 / 6.0), task.initial_model()
    assert torch.allclose(
        task.gradients(model, inputs, labels, weights), of_c(model, inputs.flatten(2), labels, weights), atol=1e-7
    )


@pytest.fixture
def forgotten() -> Iterator[None]:
    softmax_in_c.cache_clear()
    yield
    softmax_in_c.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("variable", "value"), [("FEDPRIV_NATIVE", "0"), ("CC", "/none"), ("CC", "/bin/false")])
def test_without_a_compiler_there_is_no_c(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    assert softmax_in_c() is None


@in_c
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sum * rest + 1.0f / 24.0f", "sum * rest + 1.0f / 23.0f"),
        ("if (i < size)", "if (0)"),
        ("models + c * stride", "models"),
    ],
)
def test_a_wrong_c_form_is_refused(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agrees(SoftmaxInC(compiled()))
    text, source = native._SOURCE.read_text(encoding="utf-8"), tmp_path / "softmax.c"
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = native_library(source, native._declare)
    assert library is not None
    assert not agrees(SoftmaxInC(library))
