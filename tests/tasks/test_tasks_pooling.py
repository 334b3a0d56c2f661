"""Maximum pooling with ReLU in C: torch's bits for every input, and torch for transforms, exports and other formats."""

import io
import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fedpriv.native import native_library
from fedpriv.tasks import pooling
from fedpriv.tasks.models import Cnn
from fedpriv.tasks.native import softmax_in_c
from fedpriv.tasks.pooling import MaxPoolReLU, PoolingInC, agrees, pooling_in_c
from fedpriv.tasks.task import Task

in_c = pytest.mark.skipif(pooling_in_c() is None, reason="no C compiler")
TORCHS = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
SHAPES = (
    (2, 3, 32, 32),
    (1, 1, 2, 2),
    (3, 2, 7, 9),
    (2, 5, 18, 34),
    (1, 2, 3, 2),
    (4, 6),
    (2, 19, 4, 6),
    (2, 8, 2, 2),
    (0, 3, 8, 8),
    (2, 4, 14, 28),
    (3, 7, 6, 14),
    (1, 12, 4, 10),
    (2, 3, 37, 50),
)


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of numbers, one pattern for every NaN."""
    return torch.where(tensor.isnan(), torch.tensor(-1, dtype=torch.int32), tensor.contiguous().view(torch.int32))


def derivative(pool: nn.Module, inputs: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs.clone().requires_grad_()
    values = pool(leaf)
    return values.detach(), torch.autograd.grad((values * slopes).sum(), leaf)[0]


@in_c
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_first_use_may_be_in_an_evaluation_and_draws_nothing(context: Callable[[], Any]) -> None:
    pooling_in_c.cache_clear()
    before = torch.get_rng_state()
    with context():
        assert pooling_in_c() is not None
    assert torch.equal(torch.get_rng_state(), before)


@in_c
def test_the_first_use_does_not_import_the_compiler_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, in every process."""
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    pooling_in_c.cache_clear()
    assert pooling_in_c() is not None


@in_c
def test_the_first_use_may_have_another_default_type() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        pooling_in_c.cache_clear()
        softmax_in_c.cache_clear()
        assert pooling_in_c() is not None
        assert softmax_in_c() is not None
    finally:
        torch.set_default_dtype(torch.float32)


@in_c
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["ordinary", "equal numbers", "not finite"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_derivatives_are_those_of_torch_to_the_bit(
    shape: tuple[int, ...], kind: str, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    inputs = torch.randn(shape, generator=generator)
    if kind == "equal numbers":
        inputs = torch.randint(-1, 2, shape, generator=generator) * torch.tensor(-0.5)  # with zeros of both signs
    if kind == "not finite":
        for bad in (torch.nan, torch.inf, -torch.inf):
            inputs[torch.rand(shape, generator=generator) < 0.2] = bad
    images = (inputs if len(shape) == 4 else inputs[None, None]).contiguous(memory_format=layout)
    form = pooling_in_c()
    assert form is not None
    height, width = shape[-2] // 2, shape[-1] // 2
    slopes = torch.randn((*images.shape[:-2], height, width), generator=generator)
    slopes[torch.rand(slopes.shape, generator=generator) < 0.3] = -0.0
    for mine, theirs in zip(derivative(MaxPoolReLU(), images, slopes), derivative(TORCHS, images, slopes), strict=True):
        assert torch.equal(bits(mine), bits(theirs))
        assert not mine.numel() or mine.is_contiguous(memory_format=layout)


@in_c
def test_c_takes_gradients_of_single_clients_and_torch_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    used, pool = [], PoolingInC.pool
    monkeypatch.setattr(PoolingInC, "pool", lambda self, inputs: used.append(inputs.shape) or pool(self, inputs))
    layer, images = MaxPoolReLU(), torch.randn(2, 3, 8, 8)
    layer(images)
    layer(images.to(memory_format=torch.channels_last))
    assert len(used) == 2
    for other in (images.double(), images[..., :6], images.to(torch.bfloat16)):
        assert torch.equal(layer(other), TORCHS(other))
    torch.func.vmap(layer)(images[None])
    torch.func.grad(lambda x: layer(x).sum())(images)
    assert torch.equal(make_fx(layer)(images)(-images), TORCHS(-images))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        torch.jit.trace(layer, images, check_trace=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(images)
    assert len(used) == 2


@in_c
def test_other_signs_and_another_default_device_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    images, slopes = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    expected = derivative(TORCHS, images, slopes)
    leaf = cast(Any, torch)._neg_view(-images).requires_grad_()
    values = MaxPoolReLU()(leaf)
    assert torch.equal(values, expected[0])
    values = MaxPoolReLU()(images.requires_grad_())
    assert torch.equal(torch.autograd.grad(values, images, cast(Any, torch)._neg_view(-slopes))[0], expected[1])
    with torch.device("meta"):
        pooling_in_c.cache_clear()
        softmax_in_c.cache_clear()
        found = derivative(MaxPoolReLU(), images, slopes)
        assert softmax_in_c() is not None
    assert all(map(torch.equal, found, expected))


@in_c
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 3, 7, 5)])
def test_gradients_have_gradients_and_many_are_taken_at_once(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    images, penalties = torch.randn(shape, generator=generator).requires_grad_(), []
    for pool in (MaxPoolReLU(), TORCHS):
        values = pool(images)
        slope = torch.autograd.grad(values.pow(3).sum(), images, create_graph=True)[0]
        once = torch.autograd.grad(slope.pow(2).sum(), images)[0]
        sums = torch.stack([pool(images).sum(), pool(2.0 * images).pow(2).sum()])
        penalties.append((slope, once, torch.autograd.grad(sums, images, torch.eye(2), is_grads_batched=True)[0]))
    for one, other in zip(*penalties, strict=True):
        torch.testing.assert_close(one, other)
    assert all(part.any() for part in penalties[1])


@in_c
def test_gradients_of_a_network_are_those_of_torchs_pooling_to_the_bit() -> None:
    module = Cnn(width=2).build((3, 12, 14), 10, 0)
    task, images = Task(module), torch.randn(5, 3, 12, 14)
    model, labels = task.initial_model(), torch.arange(5)
    mine = task.gradient(model, images, labels)
    layers = list(module.children())
    plain = nn.Sequential(*(TORCHS if isinstance(layer, MaxPoolReLU) else layer for layer in layers))
    assert [type(layer) for layer in layers].count(MaxPoolReLU) == 2
    assert torch.equal(mine, Task(plain).gradient(model, images, labels))


def test_the_parameters_have_the_names_of_a_model_with_all_layers_of_torch() -> None:
    """Stored weights are found again: ReLU after pooling has a number, too."""
    names = [f"{layer}.{part}" for layer in (0, 3, 7, 9) for part in ("weight", "bias")]
    assert list(Cnn(width=1).build((1, 8, 8), 10, 0).state_dict()) == names


def test_a_network_is_stored_and_read_again() -> None:
    module, file = Cnn(width=1).build((1, 8, 8), 10, 0), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(torch.load(file, weights_only=False)(images), module(images))


WRONG = (
    ("(b > a)", "(b >= a)"),
    ("(d != d)", "0"),
    (" + 0.0f", ""),
    ("most <= 0.0f", "most < 0.0f"),
    ("most < 0.0f ? 0.0f : most", "most > 0.0f ? most : 0.0f"),
    ("lower + (first), channels, 1", "lower + (first), 1, 1"),
    ("use((count) - LANES, LANES)", "use(0, LANES)"),
    ("use((count) - LANES / 2, LANES / 2)", "use(0, LANES / 2)"),
)


@in_c
def test_a_wrong_c_form_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, source = pooling._SOURCE.read_text(encoding="utf-8"), tmp_path / "pooling.c"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for right, wrong in WRONG:
        assert text.count(right) >= 1
        source.write_text(text.replace(right, wrong), encoding="utf-8")
        library = native_library(source, pooling._declare)
        assert library is not None
        assert not agrees(PoolingInC(library))


@pytest.mark.parametrize(("variable", "value"), [("FEDPRIV_NATIVE", "0"), ("CC", "/none")])
def test_without_a_compiler_torch_pools(variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    pooling_in_c.cache_clear()
    images = torch.randn(2, 3, 8, 8)
    try:
        assert pooling_in_c() is None
        assert torch.equal(MaxPoolReLU()(images), TORCHS(images))
    finally:
        pooling_in_c.cache_clear()
