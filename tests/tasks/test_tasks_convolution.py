"""Convolutions in C: those of torch up to rounding, for few channels; torch computes all others."""

import copy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fedpriv.native import native_library
from fedpriv.tasks import convolution, pooling
from fedpriv.tasks.convolution import ConvolutionInC, DirectConv2d, agrees, convolution_in_c
from fedpriv.tasks.models import Cnn
from fedpriv.tasks.task import Task

in_c = pytest.mark.skipif(convolution_in_c() is None, reason="no C compiler, or no FMA")
# images, channels, height, width, outs
SHAPES = (
    (1, 1, 1, 8, 1),
    (3, 3, 32, 32, 8),
    (5, 8, 16, 16, 16),
    (7, 1, 28, 28, 8),
    (4, 8, 14, 14, 16),
    (2, 2, 9, 31, 3),
    (2, 5, 2, 40, 9),
    (9, 7, 5, 12, 13),
    (0, 3, 8, 8, 2),
)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of inputs that C was given."""
    shapes: list[torch.Size] = []
    outputs = ConvolutionInC.outputs

    def noted(self: ConvolutionInC, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(inputs.shape)
        return outputs(self, inputs, weight, bias)

    monkeypatch.setattr(ConvolutionInC, "outputs", noted)
    return shapes


def drawn(shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format) -> tuple[DirectConv2d, Tensor]:
    images, channels, height, width, outs = shape
    torch.manual_seed(sum(shape))
    inputs = torch.randn(images, channels, height, width).contiguous(memory_format=layout)
    return DirectConv2d(channels, outs, 5, padding=2), inputs


def derivatives(layer: nn.Conv2d, inputs: Tensor, slopes: Tensor) -> list[Tensor]:
    leaf = inputs.clone().requires_grad_()
    outputs = layer(leaf)
    wanted = [leaf, *(part for part in layer.parameters() if part.requires_grad)]
    return [outputs.detach(), *torch.autograd.grad((outputs * slopes).sum(), wanted)]


def in_torch(layer: DirectConv2d) -> nn.Conv2d:
    """Return the layer of torch with the same weights, in float64."""
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, 5, padding=2)
    plain.load_state_dict(layer.state_dict())
    return plain.double()


def is_close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and float((found - expected).norm()) <= 3e-6 * float(expected.norm())


@in_c
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_derivatives_are_those_of_torch(
    shape: tuple[int, ...], layout: torch.memory_format, used: list[torch.Size]
) -> None:
    layer, inputs = drawn(shape, layout)
    slopes = torch.randn(shape[0], shape[4], *shape[2:4]).contiguous(memory_format=layout)
    found = derivatives(layer, inputs, slopes)
    assert used == [inputs.shape]
    expected = derivatives(in_torch(layer), inputs.double(), slopes.double())
    assert all(is_close(one, other) for one, other in zip(found, expected, strict=True))
    assert found[0].is_contiguous()


@in_c
def test_an_image_has_the_same_outputs_next_to_any_others() -> None:
    layer, inputs = drawn((7, 3, 13, 19, 5))
    single = torch.cat([layer(image[None]) for image in inputs])
    assert torch.equal(layer(inputs), single)


@in_c
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (5, 18), (6, 0), (12, 18)])
def test_a_number_that_is_not_finite_reaches_its_neighbors_alone(bad: float, place: tuple[int, int]) -> None:
    layer, inputs = drawn((3, 2, 13, 19, 3))
    inputs[1, 0, *place] = bad
    slopes = torch.ones(3, 3, 13, 19)
    found, expected = derivatives(layer, inputs, slopes), derivatives(in_torch(layer), inputs.double(), slopes.double())
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
    assert not any(part.isfinite().all() for part in found[2:3])  # such a gradient counts for nothing as a whole


@in_c
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_weights_have_no_derivative(frozen: str, used: list[torch.Size]) -> None:
    layer, inputs = drawn((2, 3, 8, 9, 4))
    for name, part in layer.named_parameters():
        part.requires_grad_(frozen not in (name, "both"))
    slopes = torch.randn(2, 4, 8, 9)
    plain = in_torch(layer)
    for one, other in zip(plain.parameters(), layer.parameters(), strict=True):
        one.requires_grad_(other.requires_grad)
    found, expected = derivatives(layer, inputs, slopes), derivatives(plain, inputs.double(), slopes.double())
    assert all(is_close(one, other) for one, other in zip(found, expected, strict=True))
    assert len(used) == 1


@in_c
def test_a_layer_without_a_bias_is_computed_too(used: list[torch.Size]) -> None:
    layer, inputs = drawn((2, 3, 8, 9, 4))
    cast(Any, layer).bias = None
    expected = nn.functional.conv2d(inputs.double(), layer.weight.double(), padding=2)
    assert is_close(layer(inputs).detach(), expected.detach())
    assert len(used) == 1


@in_c
def test_c_takes_few_channels_and_torch_the_rest(used: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = drawn((2, 3, 8, 8, 4))
    layer(inputs)
    assert len(used) == 1
    for other in (drawn((2, 9, 8, 8, 4)), drawn((2, 3, 8, 8, 17)), drawn((2, 3, 8, 7, 4))):
        other[0](other[1])
    double = copy.deepcopy(layer).double()
    assert double(inputs.double()).dtype == torch.float64
    layer(inputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == torch.bfloat16
    torch.func.vmap(layer)(inputs[None])
    torch.func.grad(lambda x: layer(x).sum())(inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        torch.jit.trace(layer, inputs, check_trace=False)
    copy.deepcopy(layer).to("meta")(inputs.to("meta"))
    with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        dual = torch.autograd.forward_ad.make_dual(inputs, inputs)
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
    for name, value in (("stride", (2, 2)), ("padding", (1, 1)), ("dilation", (2, 2)), ("padding_mode", "circular")):
        with monkeypatch.context() as patch:
            patch.setattr(layer, name, value)
            layer.extra_repr()
            if name == "padding_mode":
                patch.setattr(layer, "_reversed_padding_repeated_twice", [2, 2, 2, 2])
            layer(inputs)
    smaller = copy.deepcopy(layer)
    smaller.weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    assert smaller(inputs).shape == (2, 4, 10, 10)
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        layer(inputs[:, :, :0])
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer(inputs)
    with monkeypatch.context() as patch:
        patch.setattr(pooling, "_CAN_ASK", False)
        layer(inputs)
    with pytest.raises(RuntimeError, match="channels"):
        layer(inputs[:, :2])
    assert len(used) == 1


def lazily_negative(tensor: Tensor) -> Tensor:
    """Return the same numbers, in memory with the other sign: views of complex numbers are so."""
    found = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert found.is_neg()
    return found


@in_c
def test_numbers_count_with_the_sign_that_torch_gives_them() -> None:
    layer, inputs = drawn((2, 3, 8, 9, 4))
    slopes = torch.randn(2, 4, 8, 9)
    with torch.no_grad():
        assert is_close(layer(lazily_negative(inputs)), layer(inputs))
    leaf = inputs.requires_grad_()
    outputs, wanted = layer(leaf), [leaf, *layer.parameters()]
    expected = torch.autograd.grad(outputs, wanted, slopes, retain_graph=True)
    found = torch.autograd.grad(outputs, wanted, lazily_negative(slopes))
    assert all(is_close(one, other) for one, other in zip(found, expected, strict=True))
    layer.weight.data = cast(Any, torch)._neg_view(-layer.weight.detach())
    assert is_close(layer(inputs).detach(), outputs.detach())


@in_c
def test_zeros_without_memory_are_zeros() -> None:
    layer, _ = drawn((2, 3, 8, 8, 4))
    zeros = cast(Any, torch)._efficientzerotensor((2, 3, 8, 8))
    assert torch.equal(layer(zeros), layer(torch.zeros(2, 3, 8, 8)))


@in_c
def test_gradients_have_gradients() -> None:
    layer, inputs = drawn((2, 3, 8, 9, 4))
    found, expected = ([part.double() for part in penalties(each, inputs)] for each in (layer, in_torch(layer)))
    assert all(is_close(one, other) for one, other in zip(found, expected, strict=True))


def penalties(layer: nn.Conv2d, inputs: Tensor) -> list[Tensor]:
    """Return derivatives of a loss with gradients in it: of a linear one, and of another."""
    leaf = inputs.detach().to(layer.weight.dtype).requires_grad_()
    outputs = layer(leaf)
    slopes = [torch.autograd.grad(part, leaf, create_graph=True)[0] for part in (outputs.sum(), outputs.pow(2).sum())]
    loss = outputs.mean() + sum(slope.pow(2).sum() for slope in slopes)
    return list(torch.autograd.grad(loss, [leaf, *layer.parameters()]))


@in_c
def test_many_derivatives_are_taken_at_once() -> None:
    layer, inputs = drawn((2, 3, 8, 9, 4))
    leaf = inputs.requires_grad_()
    outputs = layer(leaf).sum((0, 2, 3))
    found = torch.autograd.grad(outputs, leaf, torch.eye(4), is_grads_batched=True, retain_graph=True)[0]
    expected = [torch.autograd.grad(outputs, leaf, row, retain_graph=True)[0] for row in torch.eye(4)]
    assert is_close(found, torch.stack(expected))


@in_c
def test_saved_tensors_may_return_in_another_layout() -> None:
    layer, inputs = drawn((2, 3, 8, 9, 4))

    def relaid(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    slopes = torch.randn(2, 4, 8, 9)
    expected = derivatives(layer, inputs, slopes)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, relaid):
        found = derivatives(layer, inputs, slopes)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@in_c
def test_a_recorded_graph_has_the_convolution_in_it() -> None:
    layer, inputs = drawn((2, 3, 8, 8, 4))
    recorded = make_fx(layer)(inputs)
    other = torch.randn_like(inputs)
    assert is_close(recorded(other).detach(), layer(other).detach())


@in_c
def test_the_default_device_of_torch_does_not_matter() -> None:
    layer, inputs = drawn((130, 3, 8, 8, 4))
    slopes = torch.randn(130, 4, 8, 8)
    expected = derivatives(layer, inputs, slopes)
    with torch.device("meta"):
        convolution_in_c.cache_clear()
        found = derivatives(layer, inputs, slopes)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@in_c
def test_without_further_threads_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = drawn((130, 2, 6, 9, 3))
    expected, tried = layer(inputs), []

    def start(thread: threading.Thread) -> None:
        tried.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert torch.equal(layer(inputs), expected)
    assert tried


@in_c
def test_a_thread_may_evaluate_after_the_main_one_has_ended() -> None:
    script = """
import threading, torch
from fedpriv.tasks.convolution import DirectConv2d
torch.set_num_threads(2)
layer, inputs = DirectConv2d(3, 4, 5, padding=2), torch.randn(130, 3, 8, 8)
def work():
    threading.main_thread().join()
    print(tuple(layer(inputs).shape))
threading.Thread(target=work).start()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.strip(), done.stderr.strip()) == ("(130, 4, 8, 8)", "")


@in_c
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_a_network_are_those_of_torchs_convolutions(channels_last: bool, used: list[torch.Size]) -> None:
    module = Cnn().build((3, 16, 18), 10, 0)
    images, labels = torch.randn(6, 3, 16, 18), torch.arange(6)
    task = Task(module, channels_last=channels_last)
    found = task.gradient(task.initial_model(), images, labels)
    assert len(used) == 2
    layers = (in_torch(layer) if isinstance(layer, DirectConv2d) else layer for layer in module.children())
    plain = nn.Sequential(*layers).double()
    loss = nn.functional.cross_entropy(plain(images.double()), labels)
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(plain.parameters()))])
    assert is_close(found.double(), expected)


@in_c
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int, used: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = drawn((3 * 64 + 5, 2, 6, 9, 3))
    slopes, form = torch.randn(len(inputs), 3, 6, 9), convolution_in_c()
    assert form is not None
    before = derivatives(layer, inputs, slopes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(convolution, "ThreadPoolExecutor", counted := Counted(convolution.ThreadPoolExecutor))
    after = derivatives(layer, inputs, slopes)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert counted.sizes == [threads, threads]  # outputs, and slopes by inputs
    with torch.no_grad():
        assert torch.equal(layer(inputs), before[0])
    assert len(used) == 3


class Counted:
    """Makes pools of threads, and notes their sizes."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make, self.sizes = make, []

    def __call__(self, threads: int) -> Any:
        self.sizes.append(threads)
        return self.make(threads)


@in_c
def test_an_evaluation_gives_the_layer_images_as_they_are() -> None:
    task = Task(Cnn().build((1, 8, 12), 10, 0))
    model, images = task.initial_model(), torch.randn(5, 1, 8, 12)
    assert task._for_evaluation(images) is images
    assert Task(Cnn(width=9).build((1, 8, 12), 10, 0))._for_evaluation(images) is not images
    assert Task(Cnn().build((1, 8, 12), 10, 0), precision="bfloat16")._for_evaluation(images) is not images
    assert torch.allclose(torch.cat(list(task.outputs(model, images, 2))), task.logits(model, images), atol=1e-6)


@in_c
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_first_use_may_be_in_an_evaluation_and_draws_nothing(context: Callable[[], Any]) -> None:
    convolution_in_c.cache_clear()
    before = torch.get_rng_state()
    with context():
        assert convolution_in_c() is not None
    assert torch.equal(torch.get_rng_state(), before)


@in_c
def test_the_first_use_needs_neither_the_default_type_nor_the_compiler_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    torch.set_default_dtype(torch.float64)
    try:
        convolution_in_c.cache_clear()
        assert convolution_in_c() is not None
    finally:
        torch.set_default_dtype(torch.float32)


WRONG = (
    ("TAPS - 1 - t", "t"),
    ("(y + MARGIN) * f.pitch", "y * f.pitch"),
    ("memcpy(biases", "(void)memset(biases, 0, 4), memcpy(biases + 1"),
    ("width + 2 * MARGIN > least ?", "width + 2 * MARGIN < least ?"),
    ("row[x * s.place]", "row[x]"),
    ("images - n < together ? images - n : together", "1"),
    (
        "o < outs; o++)\n        for (size_t t = 0; t < channels * SIDE",
        "o < 0; o++)\n        for (size_t t = 0; t < channels * SIDE",
    ),
)


@in_c
@pytest.mark.parametrize(("right", "wrong"), WRONG)
def test_a_wrong_c_form_is_refused(right: str, wrong: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, source = convolution._SOURCE.read_text(encoding="utf-8"), tmp_path / "convolution.c"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert text.count(right) >= 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    library = native_library(source, convolution._declare)
    assert library is not None
    assert not agrees(ConvolutionInC(library))


def test_without_memory_no_numbers_are_made_up() -> None:
    library = SimpleNamespace(convolution=lambda *_: 1, convolution_gradient=lambda *_: 1)
    form = ConvolutionInC(cast(Any, library))
    images, weight = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 5, 5)
    for call in (
        lambda: form.outputs(images, weight, None),
        lambda: form.slopes_of_inputs(images, weight),
        lambda: form.slopes_of_weights(images, images),
    ):
        with pytest.raises(MemoryError, match="no memory for a convolution"):
            call()


@pytest.mark.parametrize(("variable", "value"), [("FEDPRIV_NATIVE", "0"), ("CC", "/none")])
def test_without_a_compiler_torch_computes(variable: str, value: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, value)
    convolution_in_c.cache_clear()
    layer, inputs = drawn((2, 3, 8, 8, 4))
    try:
        assert convolution_in_c() is None
        assert torch.equal(layer(inputs), nn.functional.conv2d(inputs, layer.weight, layer.bias, padding=2))
    finally:
        convolution_in_c.cache_clear()
