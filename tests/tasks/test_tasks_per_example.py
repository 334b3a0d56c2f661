"""Sums of bounded gradients by example, against gradients of one example at a time."""

import math
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpriv.bounding import Clip, SmoothedNormalization
from fedpriv.errors import UserError
from fedpriv.tasks.convolution import DirectConv2d
from fedpriv.tasks.dense import DenseLayers
from fedpriv.tasks.equivariant import GroupConv, LiftingConv, OrientedNorm
from fedpriv.tasks.models import MODELS, Cnn, Mlp
from fedpriv.tasks.per_example import SLACK, PerExample, clipped
from fedpriv.tasks.per_example import cross_entropies as cross_entropy
from fedpriv.tasks.per_example.capture import chunk_parts, known_layers
from fedpriv.tasks.per_example.layers import LAYERS
from fedpriv.tasks.per_example.parts import Factors, Products, Rows, Segments
from fedpriv.vectors import Layout, trainable

BOUNDS = [Clip(clip_norm=0.5), SmoothedNormalization(alpha=0.3)]


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def half_squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.flatten(1) - labels.flatten(1)).square().sum(1) / 2


def made(module: nn.Module, losses=half_squares) -> PerExample:
    return PerExample(module, Layout.of_module(module), losses)


def loop(module: nn.Module, losses, inputs: Tensor, labels: Tensor) -> Tensor:
    """Gradients of one example at a time, float64 `[examples, params]`."""
    rows = []
    for i in range(len(labels)):
        loss = losses(module(inputs[i : i + 1]), labels[i : i + 1]).sum()
        parts = torch.autograd.grad(loss, list(trainable(module).values()), allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]).double())
    return torch.stack(rows)


def bounded(rows: Tensor, bound) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    if isinstance(bound, Clip):
        return rows * (bound.clip_norm / norms.clamp(min=bound.clip_norm))
    return rows / (bound.alpha + norms)


class Called(nn.Module):
    """A module of a function and the layers that it uses."""

    def __init__(self, function, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


IMAGE, TOKENS = (3, 6, 7), (5, 4)
WORDS = "words"
CASES = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear, only its bias": (lambda: frozen(nn.Linear(4, 3), "weight"), (4,)),
    "linear, only its weight": (lambda: frozen(nn.Linear(4, 3), "bias"), (4,)),
    "linear on many tokens": (lambda: nn.Linear(4, 3), TOKENS),
    "linear on few tokens": (lambda: nn.Linear(60, 50), (5, 60)),
    "linear on few tokens without bias": (lambda: nn.Linear(60, 50, bias=False), (5, 60)),
    "linear on a grid of tokens": (lambda: nn.Linear(60, 50), (2, 3, 60)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), IMAGE),
    "conv2d with stride": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)), IMAGE),
    "conv2d with dilation": (lambda: nn.Conv2d(3, 4, 2, dilation=(2, 3), bias=False), IMAGE),
    "conv2d of many channels": (lambda: nn.Conv2d(9, 4, 3, stride=2, padding=1), (9, 6, 7)),
    "conv2d in groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 5, 5)),
    "conv2d in many groups": (lambda: nn.Conv2d(6, 12, 3, groups=6), (6, 5, 5)),
    "conv2d with few places": (lambda: nn.Conv2d(40, 20, 3), (40, 3, 4)),
    "conv2d padded to the same": (lambda: nn.Conv2d(3, 4, (3, 5), padding="same"), IMAGE),
    "conv2d padded by reflection": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv2d, only its bias": (lambda: frozen(nn.Conv2d(3, 4, 3), "weight"), IMAGE),
    "direct conv2d": (lambda: DirectConv2d(3, 4, 5, padding=2), (3, 6, 9)),
    "direct conv2d in torch": (lambda: DirectConv2d(9, 4, 5, padding=2), (9, 6, 7)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 3, 5)),
    "embedding": (lambda: nn.Embedding(6, 4), WORDS),
    "embedding with padding": (lambda: nn.Embedding(6, 4, padding_idx=2), WORDS),
    "layer norm": (lambda: nn.LayerNorm(4), TOKENS),
    "layer norm of matrices": (lambda: nn.LayerNorm([5, 4], bias=False), TOKENS),
    "rms norm": (lambda: nn.RMSNorm(4), TOKENS),
    "group norm": (lambda: nn.GroupNorm(3, 6), (6, 5, 5)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 6), (6,)),
    "group norm, only its bias": (lambda: frozen(nn.GroupNorm(2, 6), "weight"), (6, 4)),
    "lifting conv": (lambda: LiftingConv(3, 2, 5), IMAGE),
    "group conv": (lambda: GroupConv(3, 2, 3), (12, 5, 6)),
    "oriented norm": (lambda: OrientedNorm(3), (12, 5, 6)),
}


def drawn(layer: nn.Module, shape, examples: int = 6, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A net around the layer; its derivatives by the layer's outputs differ by example, inputs and labels."""
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        terms = parameter[0].numel()  # with large sums, tanh would magnify the rounding of its inputs
        parameter.data.normal_(std=min(0.3, terms**-0.5))
    inputs = torch.randint(6, (examples, 5)) if shape == WORDS else torch.randn(examples, *shape)
    net = nn.Sequential(layer, nn.Tanh())
    return net, inputs, torch.randn_like(net(inputs))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bound", BOUNDS, ids=["clip", "smoothed"])
def test_every_layer_gives_the_sum_of_single_bounded_gradients(name, bound):
    make, shape = CASES[name]
    net, inputs, labels = drawn(make(), shape)
    rows = loop(net, half_squares, inputs, labels)
    sums = made(net)
    assert sums.is_fast(inputs, labels)
    expected = bounded(rows, bound).sum(0)
    assert torch.allclose(sums.norms(inputs, labels), rows.norm(dim=1), rtol=2e-6)
    found = sums.clipped_sum(inputs, labels, bound)
    assert found.dtype == torch.float64
    assert float((found - expected).norm()) <= 2e-6 * bound.l2_bound * len(labels)


def test_every_layer_of_the_table_is_tested():
    assert {type(make()) for make, _ in CASES.values()} == set(LAYERS)


FORMS = {
    "linear": Products,
    "linear on many tokens": Rows,
    "linear on few tokens": Factors,
    "conv2d": Rows,
    "conv2d with few places": Factors,
    "embedding": Segments,
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_a_layers_gradients_follows_from_its_shape(name):
    make, shape = CASES[name]
    net, inputs, labels = drawn(make(), shape)
    (part,) = chunk_parts(net, known_layers(net), half_squares, inputs, labels)
    assert type(part) is FORMS[name]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("text-encoder", "timm")])
@pytest.mark.parametrize("bound", BOUNDS, ids=["clip", "smoothed"])
def test_every_model_gives_the_sum_of_single_bounded_gradients(name, bound):
    torch.manual_seed(0)
    module = MODELS[name]().build((3, 8, 8), 10, 0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    inputs, labels = torch.randn(7, 3, 8, 8), torch.randint(10, (7,))
    sums = made(module, cross_entropy)
    assert sums.is_fast(inputs, labels)
    expected = bounded(loop(module, cross_entropy, inputs, labels), bound).sum(0)
    found = sums.clipped_sum(inputs, labels, bound)
    assert float((found - expected).norm()) <= 3e-6 * bound.l2_bound * len(labels)


class Tied(nn.Module):
    """One matrix as the weights of an embedding and of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.last.weight = self.words.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.words(inputs).mean(1).tanh())


class Own(nn.Module):
    """Parameters without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last((inputs * self.scale).tanh())


class Branching(nn.Module):
    """A branch by the content of an example, which `vmap` refuses, and a layer that `vmap` refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.last = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = [row * self.own if float(row.sum()) > 0 else row + self.own for row in inputs]
        return self.last(torch.stack(rows))


def hooked() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda *given: 2 * given[-1])
    return layer


SLOW = {
    "tied weights": (Tied, WORDS),
    "parameters without a layer": (Own, (4,)),
    "a branch by content": (Branching, (4,)),
    "a layer used twice": (lambda: Called(lambda net, x: net.layer(net.layer(x).tanh()), layer=nn.Linear(4, 4)), (4,)),
    "a weight used elsewhere, too": (
        lambda: Called(lambda net, x: net.layer(x) + x @ net.layer.weight.T.square(), layer=nn.Linear(4, 4)),
        (4,),
    ),
    "a weight used only elsewhere": (
        lambda: Called(lambda net, x: x @ net.layer.weight.T + net.layer.bias, layer=nn.Linear(4, 4)),
        (4,),
    ),
    "a weight used elsewhere, its layer for nothing": (
        lambda: Called(
            lambda net, x: (net.layer(x), x @ net.layer.weight.T + net.layer.bias)[1], layer=nn.Linear(4, 4)
        ),
        (4,),
    ),
    "examples not first": (
        lambda: Called(lambda net, x: net.layer(x.transpose(0, 1)).transpose(0, 1), layer=nn.Linear(4, 3)),
        (5, 4),
    ),
    "examples and tokens in one axis": (
        lambda: Called(lambda net, x: net.layer(x.flatten(0, 1)).view(*x.shape[:2], -1), layer=nn.Linear(4, 3)),
        (5, 4),
    ),
    "a hook": (hooked, (4,)),
    "another layer": (
        lambda: Called(lambda net, x: net.layer(x, x.square()), layer=nn.Bilinear(4, 4, 3)),
        (4,),
    ),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(3, 2, 3), IMAGE),
    "a subclass": (lambda: type("Mine", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T})(4, 3), (4,)),
}


@pytest.mark.parametrize("examples", [3, 5, 6])
@pytest.mark.parametrize("name", SLOW)
def test_what_the_table_does_not_cover_is_computed_one_by_one(name, examples):
    make, shape = SLOW[name]
    torch.manual_seed(0)
    net, inputs, labels = drawn(make(), shape, examples)
    sums, bound = made(net), BOUNDS[0]
    assert not sums.is_fast(inputs, labels)
    rows = loop(net, half_squares, inputs, labels)
    assert torch.allclose(sums.norms(inputs, labels), rows.norm(dim=1), rtol=1e-5)
    found = sums.clipped_sum(inputs, labels, bound)
    assert float((found - bounded(rows, bound).sum(0)).norm()) <= 2e-6 * bound.l2_bound * examples


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_known_layers_do_not_import_the_compiler_of_torch(context, monkeypatch):
    """It takes seconds, in every process; the trial of the layers ran vmap."""
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    net, inputs, labels = Cnn(width=2).build((1, 8, 8), 10, 0), torch.randn(4, 1, 8, 8), torch.arange(4)
    sums = made(net, cross_entropy)
    with context():
        assert sums.is_fast(inputs, labels)
        assert sums.clipped_sum(inputs, labels, BOUNDS[0]).isfinite().all()


def inner(net: nn.Module) -> nn.Linear:
    layer = net.get_submodule("layer")
    assert isinstance(layer, nn.Linear)
    return layer


def twice(net: nn.Module, inputs: Tensor) -> Tensor:
    layer = inner(net)
    return layer(layer(inputs).tanh() if float(inputs.abs().sum()) > 1e4 else inputs)


def elsewhere(net: nn.Module, inputs: Tensor) -> Tensor:
    layer = inner(net)
    outputs = layer(inputs)
    return outputs + inputs @ layer.weight.T.square() if float(inputs.abs().sum()) > 1e4 else outputs


@pytest.mark.parametrize("function", [twice, elsewhere])
def test_a_module_that_computes_otherwise_on_some_inputs_is_right_there_too(function):
    net = Called(function, layer=nn.Linear(4, 4))
    sums = made(net)
    for scale in (1.0, 1e4):
        inputs, labels = scale * torch.randn(6, 4), torch.randn(6, 4)
        assert sums.is_fast(inputs, labels)
        rows = loop(net, half_squares, inputs, labels)
        found = sums.clipped_sum(inputs, labels, BOUNDS[0])
        assert torch.allclose(found, bounded(rows, BOUNDS[0]).sum(0), atol=1e-5)


def test_a_relu_in_place_after_a_layer_changes_nothing():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(80, 3))
    inputs, labels = torch.randn(6, *IMAGE), torch.randn(6, 3)
    sums = made(net)
    assert sums.is_fast(inputs, labels)
    expected = bounded(loop(net, half_squares, inputs, labels), BOUNDS[0]).sum(0)
    assert torch.allclose(sums.clipped_sum(inputs, labels, BOUNDS[0]), expected, atol=2e-6)


def test_unused_and_frozen_layers_are_left_out():
    net = Called(
        lambda net, x: net.last(net.base(x)), base=frozen(nn.Linear(4, 4), "weight", "bias"), last=nn.Linear(4, 3)
    )
    net.spare = nn.Linear(2, 2)
    inputs, labels = torch.randn(6, 4), torch.randn(6, 3)
    sums = made(net)
    assert sums.is_fast(inputs, labels)
    expected = bounded(loop(net, half_squares, inputs, labels), BOUNDS[0]).sum(0)
    assert len(expected) == 15 + 6
    assert torch.allclose(sums.clipped_sum(inputs, labels, BOUNDS[0]), expected, atol=2e-6)


class Adapted(nn.Module):
    """A frozen layer beside two small ones, as PEFT's LoRA has them."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = frozen(base, "weight", "bias")
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base_layer(inputs) + 2.0 * self.lora_B["default"](self.lora_A["default"](inputs))


def test_low_rank_adapters_are_layers_of_their_own():
    net = nn.Sequential(Adapted(nn.Linear(4, 8), 2), nn.Tanh(), Adapted(nn.Linear(8, 3), 2))
    inputs, labels = torch.randn(6, 5, 4), torch.randn(6, 5, 3)
    sums = made(net)
    assert sums.is_fast(inputs, labels)
    expected = bounded(loop(net, half_squares, inputs, labels), BOUNDS[0]).sum(0)
    assert len(expected) == 2 * 12 + 2 * 11
    assert torch.allclose(sums.clipped_sum(inputs, labels, BOUNDS[0]), expected, atol=2e-6)


class Block(nn.Module):
    """A small transformer: attention, two norms, an embedding."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(6, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.last = nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        words = self.words(inputs)
        x = self.before(words)
        found = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.last(self.after(words + self.out(found)).mean(1))


def test_a_transformer_is_fast_and_right():
    net = Block()
    inputs, labels = torch.randint(6, (9, 5)), torch.randint(3, (9,))
    sums = made(net, cross_entropy)
    assert sums.is_fast(inputs, labels)
    expected = bounded(loop(net, cross_entropy, inputs, labels), BOUNDS[0]).sum(0)
    assert torch.allclose(sums.clipped_sum(inputs, labels, BOUNDS[0]), expected, atol=2e-6)


BATCHES = [
    lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    lambda: nn.Embedding(6, 4, scale_grad_by_freq=True),
    lambda: nn.Embedding(6, 4, max_norm=1.0),
]


@pytest.mark.parametrize("make", BATCHES)
def test_layers_that_mix_examples_are_refused(make):
    with pytest.raises(UserError, match="do not mix examples"):
        made(make())


@pytest.mark.parametrize(
    "function", [lambda net, x: net.layer(x - x.mean(0)), lambda net, x: F.dropout(net.layer(x), 0.5)]
)
def test_outputs_that_depend_on_other_examples_or_chance_are_refused(function):
    sums = made(Called(function, layer=nn.Linear(4, 30)))
    with pytest.raises(UserError, match="depend on it alone"):
        sums.clipped_sum(torch.randn(6, 4), torch.randn(6, 30), BOUNDS[0])


def test_losses_that_are_no_vector_by_example_are_refused():
    sums = made(nn.Linear(4, 3), F.cross_entropy)
    with pytest.raises(ValueError, match="losses of shape"):
        sums.clipped_sum(torch.randn(6, 4), torch.zeros(6, dtype=torch.long), BOUNDS[0])


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "dense": (Mlp(hidden=(8,)).build((6,), 3, 0), (6,)),
        "tokens": (
            Called(
                lambda net, x: net.last(net.layer(x).tanh().mean(1)), layer=nn.Linear(40, 40), last=nn.Linear(40, 3)
            ),
            (4, 40),
        ),
        "cnn": (Cnn(width=2).build((3, 8, 8), 3, 0), (3, 8, 8)),
        "slow": (nn.Sequential(Own()), (4,)),
    }


NETS = list(nets())
EXTREMES = [1e-45, 1e-38, 1e-20, 1.0, 1e10, 1e19, 1e30, 3e38, math.inf, math.nan]


@pytest.mark.parametrize("scale", EXTREMES)
@pytest.mark.parametrize("bound", BOUNDS, ids=["clip", "smoothed"])
@pytest.mark.parametrize("name", NETS)
def test_one_example_never_exceeds_the_bound(name, bound, scale):
    net, shape = nets()[name]
    inputs, labels = scale * torch.randn(2, *shape), torch.randint(3, (2,))
    sums = made(net, lambda outputs, labels: scale * cross_entropy(outputs, labels))
    for i in range(2):
        found = sums.clipped_sum(inputs[i : i + 1], labels[i : i + 1], bound)
        assert torch.isfinite(found).all()
        assert float(found.norm()) <= bound.l2_bound


@pytest.mark.parametrize("name", NETS)
def test_a_long_gradient_uses_the_whole_bound(name):
    net, shape = nets()[name]
    sums = made(net, lambda outputs, labels: 1e6 * cross_entropy(outputs, labels))
    found = sums.clipped_sum(torch.randn(1, *shape), torch.zeros(1, dtype=torch.long), BOUNDS[0])
    assert float(found.norm()) == pytest.approx(0.5, rel=2e-6)


@pytest.mark.parametrize("name", NETS)
def test_an_example_with_nan_or_outside_the_mask_counts_as_zero_to_the_bit(name):
    net, shape = nets()[name]
    inputs, labels = torch.randn(9, *shape), torch.randint(3, (9,))
    sums = made(net, cross_entropy)
    mask = torch.ones(9, dtype=torch.bool)
    mask[[2, 5]] = False
    expected = sums.clipped_sum(inputs, labels, BOUNDS[0], mask)
    alone = sums.clipped_sum(inputs[mask], labels[mask], BOUNDS[0])
    assert torch.allclose(expected, alone, atol=1e-6)
    for bad in (math.nan, math.inf, 1e30, 0.0):
        broken = inputs.clone()
        broken[[2, 5]] = bad
        assert torch.equal(sums.clipped_sum(broken, labels, BOUNDS[0], mask), expected)
        if not math.isfinite(bad):
            assert torch.equal(sums.clipped_sum(broken, labels, BOUNDS[0]), expected)
    assert not sums.clipped_sum(inputs, labels, BOUNDS[0], torch.zeros(9, dtype=torch.bool)).any()
    assert not sums.clipped_sum(inputs[:0], labels[:0], BOUNDS[0]).any()


@pytest.mark.parametrize("name", NETS)
def test_other_examples_change_no_bit_of_a_norm(name):
    net, shape = nets()[name]
    inputs, labels = torch.randn(9, *shape), torch.randint(3, (9,))
    sums = made(net, cross_entropy)
    expected = sums.norms(inputs, labels)
    for scale in (0.0, -3.0, 1e20, math.nan):
        others = scale * inputs
        others[4] = inputs[4]
        assert sums.norms(others, labels)[4] == expected[4]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NETS), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e4, 1e12]))
def test_replacing_one_example_moves_a_sum_by_at_most_twice_the_bound(name, examples, seed, scale):
    net, shape = nets()[name]
    torch.manual_seed(seed)
    inputs, labels = torch.randn(examples, *shape), torch.randint(3, (examples,))
    sums = made(net, lambda outputs, labels: scale * cross_entropy(outputs, labels))
    place = seed % examples
    first = sums.clipped_sum(inputs, labels, BOUNDS[0])
    inputs[place], labels[place] = scale * torch.randn(shape), (labels[place] + 1) % 3
    moved = float((sums.clipped_sum(inputs, labels, BOUNDS[0]) - first).norm())
    assert moved <= 2 * BOUNDS[0].l2_bound * (1 + SLACK)


def test_many_equal_and_opposite_rows_keep_the_slack_that_float32_would_exceed():
    examples = 60_000
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    inputs = torch.randn(1, 6).expand(examples, 6).clone()
    labels = torch.zeros(examples, dtype=torch.long)
    sums = made(net, lambda outputs, labels: 1e3 * cross_entropy(outputs, labels))
    first = sums.clipped_sum(inputs, labels, BOUNDS[0])
    labels[7] = 1
    moved = float((sums.clipped_sum(inputs, labels, BOUNDS[0]) - first).norm())
    assert moved == pytest.approx(1.0, abs=2e-6)
    assert moved <= 1.0 + SLACK


def test_terms_that_cancel_are_charged():
    net = nn.Sequential(nn.Linear(40, 30, bias=False))
    sums = made(net, lambda outputs, _: (outputs[:, 0] - (1 - 1e-6) * outputs[:, 1]).sum(1))
    inputs, labels = torch.ones(1, 2, 40), torch.zeros(1)
    sign = loop(net, sums._losses, inputs, labels).norm()
    total = math.sqrt(40 * 30) * (2 - 1e-6)
    assert float(sign) < 1e-3 * total
    assert float(sums.norms(inputs, labels)) == pytest.approx(total / 256, rel=1e-6)


def test_too_many_examples_for_the_slack_are_refused():
    sums = made(nn.Sequential(nn.Flatten(), nn.Linear(1, 1)))
    inputs = torch.zeros(1, 1).expand(2**21 + 1, 1)
    with pytest.raises(UserError, match="at most 2,097,152 examples"):
        sums.clipped_sum(inputs, inputs, BOUNDS[0])


@pytest.mark.parametrize("name", NETS)
def test_chunks_and_groups_change_sums_by_rounding_alone(name, monkeypatch):
    net, shape = nets()[name]
    inputs, labels = torch.randn(23, *shape), torch.randint(3, (23,))
    whole = made(net, cross_entropy).clipped_sum(inputs, labels, BOUNDS[0])
    monkeypatch.setattr(clipped, "_MAX_CHUNK", 3)
    monkeypatch.setattr(clipped, "_GROUP", 16)
    cut = made(net, cross_entropy).clipped_sum(inputs, labels, BOUNDS[0])
    assert torch.allclose(cut, whole, atol=1e-6)


def test_a_chunk_holds_a_limited_number_of_floats(monkeypatch):
    seen = []
    net = nn.Sequential(nn.Conv2d(9, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 3))
    net.register_forward_hook(lambda *given: seen.append(len(given[-1])))
    monkeypatch.setattr(clipped, "MAX_FLOATS", 2**15)
    sums = made(net, cross_entropy)
    sums.clipped_sum(torch.randn(50, 9, 8, 8), torch.randint(3, (50,)), BOUNDS[0])
    assert max(seen[3:]) < 10
    assert sum(seen) >= 50


@pytest.mark.parametrize("name", NETS)
def test_modules_in_float64_are_summed_likewise(name):
    net, shape = nets()[name]
    net.double()
    inputs, labels = torch.randn(5, *shape, dtype=torch.float64), torch.randint(3, (5,))
    rows = loop(net, cross_entropy, inputs, labels)
    found = made(net, cross_entropy).clipped_sum(inputs, labels, BOUNDS[0])
    assert torch.allclose(found, bounded(rows, BOUNDS[0]).sum(0), atol=3e-6)


@pytest.mark.parametrize("examples", [3, 300])
def test_other_maps_bound_gradients_that_are_computed_one_by_one(examples):
    class Doubled(Clip):
        def __call__(self, vectors: Tensor) -> Tensor:
            return super().__call__(2 * vectors)

    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    inputs, labels = torch.randn(examples, 4), torch.randint(3, (examples,))
    mask = torch.rand(examples) < 0.5
    rows = loop(net, cross_entropy, inputs, labels)
    expected = bounded(2 * rows, BOUNDS[0])[mask].sum(0)
    found = made(net, cross_entropy).clipped_sum(inputs, labels, Doubled(clip_norm=0.5), mask)
    assert torch.allclose(found, expected, atol=1e-6 * examples)


def test_gradients_are_those_at_the_parameters_of_the_moment():
    net, shape = nets()["cnn"]
    inputs, labels = torch.randn(4, *shape), torch.randint(3, (4,))
    sums = made(net, cross_entropy)
    sums.norms(inputs, labels)
    for parameter in net.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    assert torch.allclose(sums.norms(inputs, labels), loop(net, cross_entropy, inputs, labels).norm(dim=1), rtol=1e-5)


@pytest.mark.parametrize("bound", BOUNDS, ids=["clip", "smoothed"])
@pytest.mark.parametrize("shared", [True, False])
def test_sums_of_many_clients_are_those_of_each(bound, shared):
    module = Mlp(hidden=(8, 5)).build((6,), 3, 0)
    layout = Layout.of_module(module)
    dense = DenseLayers.of_module(module)
    assert dense is not None
    start = layout.flatten(trainable(module)).detach()
    models = start if shared else start + 0.1 * torch.randn(4, layout.size)
    inputs, labels, mask = torch.randn(4, 9, 6), torch.randint(3, (4, 9)), torch.rand(4, 9) < 0.7
    inputs[1, 3], inputs[2, 4] = math.nan, 1e30
    mask[1, 3] = mask[2, 4] = True
    found = dense.clipped_sums(models, inputs, labels, mask, bound)
    assert found.dtype == torch.float64
    for i in range(4):
        for parameter, value in zip(
            module.parameters(), layout.unflatten(start if shared else models[i]).values(), strict=True
        ):
            parameter.data = value
        expected = made(module, cross_entropy).clipped_sum(inputs[i], labels[i], bound, mask[i])
        assert torch.allclose(found[i], expected, atol=3e-6)
