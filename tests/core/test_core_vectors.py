"""Flat vectors: nothing is lost, moved or mixed between a module and its vector."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import brief, same
from torch import Tensor, nn

from fedpriv.errors import UserError, nearest
from fedpriv.vectors import Layout, refuse_buffers

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5)


def tensors_of(shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"p{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}


@brief
@given(shapes=shapes)
def test_unflatten_undoes_flatten_to_the_bit(shapes: list[tuple[int, ...]]) -> None:
    tensors = tensors_of(shapes)
    layout = Layout.of(tensors)
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.size,)
    back = layout.unflatten(vector)
    assert list(back) == list(tensors)
    assert all(same(back[name].contiguous(), tensors[name]) for name in tensors)
    assert same(layout.flatten(back), vector)


@brief
@given(shapes=shapes, clients=st.integers(0, 3))
def test_unflattening_a_batch_is_unflattening_each_row(shapes: list[tuple[int, ...]], clients: int) -> None:
    layout = Layout.of(tensors_of(shapes))
    vectors = torch.randn(clients, layout.size, generator=torch.Generator().manual_seed(2))
    together = layout.unflatten(vectors)
    for row in range(clients):
        for name, tensor in layout.unflatten(vectors[row]).items():
            assert torch.equal(together[name][row], tensor)
    assert [tuple(tensor.shape) for tensor in together.values()] == [(clients, *shape) for _, shape in layout.entries]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_unflatten_gives_views_without_copying(lead: tuple[int, ...]) -> None:
    layout = Layout.of({"weight": torch.zeros(2, 3), "scale": torch.zeros(()), "bias": torch.zeros(4)})
    vector = torch.zeros(*lead, layout.size)
    tensors = layout.unflatten(vector)
    vector += torch.arange(layout.size)
    assert tensors["weight"].reshape(-1, 6)[-1].tolist() == [0, 1, 2, 3, 4, 5]
    assert tensors["scale"].reshape(-1)[-1].item() == 6
    assert tensors["bias"].reshape(-1, 4)[-1].tolist() == [7, 8, 9, 10]
    assert all(
        tensor.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for tensor in tensors.values()
    )


def test_a_modules_layout_has_its_parameters_in_their_order() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    layout = Layout.of_module(module)
    assert layout.entries == (("0.weight", (2, 3)), ("0.bias", (2,)), ("2.weight", (1, 2)))
    assert layout.size == sum(parameter.numel() for parameter in module.parameters())
    vector = layout.flatten(dict(module.named_parameters()))
    assert torch.equal(vector, torch.nn.utils.parameters_to_vector(module.parameters()))


def test_a_module_without_parameters_has_an_empty_vector() -> None:
    layout = Layout.of_module(nn.ReLU())
    assert layout.size == 0
    assert layout.flatten({}).shape == (0,)
    assert layout.unflatten(torch.zeros(2, 0)) == {}


@pytest.mark.parametrize("bad", [nn.BatchNorm1d(4), nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))])
def test_buffers_are_refused_in_one_line_that_says_what_to_do(bad: nn.Module) -> None:
    with pytest.raises(UserError, match=r"running_mean.*GroupNorm") as caught:
        Layout.of_module(bad)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model: expected parameters only, got ")


def test_fixed_buffers_and_frozen_parameters_are_no_part_of_the_vector() -> None:
    module = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.BatchNorm1d(2).eval(), nn.Linear(2, 3))
    module.register_buffer("scale", torch.ones(1))
    assert Layout.of_module(module).entries == (
        ("1.weight", (2,)),
        ("1.bias", (2,)),
        ("2.weight", (3, 2)),
        ("2.bias", (3,)),
    )


def test_what_is_trained_in_another_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model parameter 0\.weight: expected torch\.float32, got torch\.bfloat16"):
        Layout.of_module(nn.Sequential(nn.Linear(2, 2).bfloat16()))


def test_named_buffers_are_refused_and_none_are_not() -> None:
    refuse_buffers([])
    with pytest.raises(UserError, match=r"a, b, c, d, \.\.\.\."):
        refuse_buffers("abcde")


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)},
        {"weight": torch.zeros(6), "bias": torch.zeros(2)},
        {"bias": torch.zeros(2), "weight": torch.zeros(2, 3)},
        {"weights": torch.zeros(2, 3), "bias": torch.zeros(2)},
        {"weight": torch.zeros(2, 3)},
        {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)},
        {},
    ],
)
def test_tensors_of_another_layout_are_refused_in_one_line(wrong: dict[str, Tensor]) -> None:
    layout = Layout.of({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    with pytest.raises(UserError, match=r"^model: expected tensors weight\[2, 3\], bias\[2\], got ") as caught:
        layout.flatten(wrong)
    assert "\n" not in str(caught.value)


def test_a_vector_of_another_length_is_refused() -> None:
    layout = Layout.of({"weight": torch.zeros(2, 3)})
    for length in (5, 7):
        with pytest.raises(RuntimeError):
            layout.unflatten(torch.zeros(length))


def test_flatten_does_not_share_memory_with_the_tensors() -> None:
    tensors = {"a": torch.zeros(3), "b": torch.ones(2)}
    vector = Layout.of(tensors).flatten(tensors)
    vector += 5.0
    assert tensors["a"].sum() == 0.0


def test_a_user_error_is_one_line_that_says_where_what_and_what_to_do() -> None:
    error = UserError("method.alpha", "a\n  positive number", -1, "Give\n more")
    assert str(error) == "method.alpha: expected a positive number, got -1. Give more."
    assert error.where == "method.alpha"
    assert isinstance(error, ValueError)


def test_the_nearest_name_is_suggested() -> None:
    assert nearest("alpha-normce", ["alpha-normec", "clip21"]).startswith("Did you mean 'alpha-normec'?")
    assert nearest("zzz", ["b", "a"]) == "Known: a, b"
    assert nearest("zzz", []) == "Known: none"
    many = [f"column-{number}" for number in range(1000)]
    assert nearest("colum-7", many).startswith("Did you mean 'column-7'? Closest of 1,000 names: column-7, ")
    assert len(nearest("zzz", many)) < 200
