import tracemalloc

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fedpriv.errors import UserError
from fedpriv.tasks.equivariant import ORIENTATIONS, GroupConv
from fedpriv.tasks.models import MODELS, Cnn, Mlp

IMAGES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 9)]
# Others are built from files; see test_tasks_pretrained.py.
WITHOUT_FILES = [name for name in MODELS if name not in ("text-encoder", "timm")]
CASES = [
    (name, shape) for name in WITHOUT_FILES for shape in [*IMAGES, (123,)] if len(shape) == 3 or MODELS[name].dense
]


def build(name: str, shape: tuple[int, ...] = (1, 8, 8), classes: int = 10, seed: int = 0) -> nn.Module:
    return MODELS[name]().build(shape, classes, seed)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_logits_have_one_column_for_each_class(name, shape):
    assert build(name, shape, classes=7)(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_no_model_has_buffers(name, shape):
    assert list(build(name, shape).buffers()) == []


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_one_seed_gives_the_same_parameters_to_the_bit_whatever_the_global_state(name):
    torch.manual_seed(1)
    one = build(name, seed=3).state_dict()
    torch.manual_seed(2)
    two = build(name, seed=3).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", sorted(set(WITHOUT_FILES) - {"softmax"}))
def test_another_seed_gives_another_start(name):
    one = nn.utils.parameters_to_vector(build(name, seed=3).parameters())
    two = nn.utils.parameters_to_vector(build(name, seed=4).parameters())
    assert not torch.equal(one, two)


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_building_leaves_the_global_generator_as_it_was(name):
    before = torch.get_rng_state()
    build(name)
    assert torch.equal(torch.get_rng_state(), before)


def test_softmax_starts_at_zero():
    assert all((parameter == 0).all() for parameter in build("softmax").parameters())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("softmax", (1, 28, 28), 7_850),
        ("mlp", (1, 28, 28), 784 * 64 + 64 + 640 + 10),
        ("cnn", (3, 32, 32), 61_794),
        ("resnet20", (3, 32, 32), 269_722),
    ],
)
def test_parameters_are_as_many_as_documented(name, shape, expected):
    assert size(build(name, shape)) == expected


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_what_is_counted_is_what_is_built_and_nothing_is_drawn(name, shape):
    before = torch.get_rng_state()
    counted = MODELS[name]().parameters(shape, 7)
    assert counted == size(build(name, shape, classes=7))
    assert torch.equal(torch.get_rng_state(), before)


def test_ten_billion_parameters_are_counted_without_being_made():
    tracemalloc.start()
    assert Mlp(hidden=(10**5, 10**5)).parameters((1, 28, 28), 10) == 785 * 10**5 + 100_001 * 10**5 + 100_001 * 10
    assert Cnn(width=10**4).parameters((3, 32, 32), 10) == 94_601_550_010
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_more_layers_than_anybody_trains_are_refused():
    with pytest.raises(UserError, match=r"^model\.hidden: expected at most 1,000 widths, got 1,001"):
        Mlp(hidden=(1,) * 1001)


def test_mlp_widths_may_be_a_list_and_are_kept_as_a_tuple():
    settings = Mlp(hidden=[5, 4])  # pyright: ignore[reportArgumentType]
    assert settings == Mlp(hidden=(5, 4))
    assert size(settings.build((3,), 2, 0)) == (3 * 5 + 5) + (5 * 4 + 4) + (4 * 2 + 2)


def test_mlp_without_hidden_layers_is_a_linear_model():
    assert size(Mlp(hidden=()).build((3,), 2, 0)) == 3 * 2 + 2


def test_cnn_width_scales_its_layers():
    assert size(Cnn(width=4).build((1, 8, 8), 10, 0)) < size(Cnn(width=16).build((1, 8, 8), 10, 0))


@pytest.mark.parametrize("name", WITHOUT_FILES)
def test_the_gradient_of_a_batch_of_one_is_a_row_of_the_batched_gradients(name):
    module = build(name, (1, 8, 8), seed=1)
    parameters = {key: value.detach() for key, value in module.named_parameters()}
    inputs, labels = torch.randn(3, 1, 1, 8, 8), torch.tensor([[0], [4], [9]])

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(functional_call(module, p, (x,)), y)

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels)
    alone = grad(loss)(parameters, inputs[1], labels[1])
    assert all(torch.allclose(rows[key][1], alone[key], atol=1e-5) for key in alone)


@pytest.mark.parametrize("name", [name for name in WITHOUT_FILES if not MODELS[name].dense])
@pytest.mark.parametrize("shape", [(123,), (8, 8), (1, 3, 8)])
def test_inputs_that_are_no_images_are_refused_by_convolutions(name, shape):
    with pytest.raises(UserError, match=r"^model\.name: .*Choose 'softmax' or 'mlp'"):
        build(name, shape)


@pytest.mark.parametrize("hidden", [(0,), (64, -1), (1.5,), "64", 64, (True,)])
def test_hidden_widths_without_meaning_are_refused(hidden):
    with pytest.raises(UserError, match=r"^model\.hidden: "):
        Mlp(hidden=hidden)


@pytest.mark.parametrize("width", [0, -1, 2.0, True])
def test_a_width_without_meaning_is_refused(width):
    with pytest.raises(UserError, match=r"^model\.width: "):
        Cnn(width=width)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 5, 9)])
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_the_equivariant_model_gives_turned_images_the_same_logits(shape, turn):
    module = build("c4-cnn", shape).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter))
    images = torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(module(images.rot90(turn, (-2, -1))), module(images), rtol=1e-10, atol=1e-10)
    assert (module(images.flip(-1)) - module(images)).abs().max() > 1e-6  # mirrored images differ


def test_turned_inputs_of_a_group_convolution_give_turned_and_shifted_maps():
    conv = GroupConv(2, 3, 3).double()
    maps = torch.randn(1, 2 * ORIENTATIONS, 6, 6, dtype=torch.float64)
    turned = maps.rot90(1, (-2, -1)).unflatten(1, (2, ORIENTATIONS)).roll(1, dims=2).flatten(1, 2)
    expected = conv(maps).rot90(1, (-2, -1)).unflatten(1, (3, ORIENTATIONS)).roll(1, dims=2).flatten(1, 2)
    torch.testing.assert_close(conv(turned), expected)


def test_the_equivariant_model_has_as_many_parameters_as_it_says():
    assert size(build("c4-cnn", (3, 32, 32))) == 14_674
