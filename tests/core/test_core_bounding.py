"""Bounded maps: the bound holds for every input, and the formulas match the papers."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.helpers import NON_FINITE, brief, numbers, rows, same, squared_norm, thorough, within
from torch import Tensor

from fedpriv.bounding import Bounded, Clip, SmoothedNormalization, finite_rows
from fedpriv.errors import UserError

MARGIN = 2.0**-20
"""Relative tolerance: how far below the formula a map may stay so that the bound survives rounding."""

MAPS = {
    "clip 1": Clip(clip_norm=1.0),
    "clip 0.1": Clip(clip_norm=0.1),
    "clip 1e-6": Clip(clip_norm=1e-6),
    "clip 3e5": Clip(clip_norm=3e5),
    "normalization 1": SmoothedNormalization(alpha=1.0),
    "normalization 0.01": SmoothedNormalization(alpha=0.01),
    "normalization 1e-9": SmoothedNormalization(alpha=1e-9),
    "normalization 30": SmoothedNormalization(alpha=30.0),
}
DTYPES = [torch.float32, torch.float64]

every_map = pytest.mark.parametrize("bounded", MAPS.values(), ids=MAPS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
sizes = st.floats(1e-6, 1e6)
any_map = st.one_of(
    st.builds(lambda size: Clip(clip_norm=size), sizes),
    st.builds(lambda size: SmoothedNormalization(alpha=size), sizes),
)


def formula(bounded: Bounded, vector: Tensor) -> Tensor:
    """Return the paper's map of one float64 vector, for numbers of ordinary size."""
    norm = math.sqrt(float((vector.double() ** 2).sum()))
    if isinstance(bounded, Clip):
        return vector * min(1.0, bounded.clip_norm / norm) if norm else vector
    assert isinstance(bounded, SmoothedNormalization)
    return vector / (bounded.alpha + norm)


class TestEdgeCases:
    """The rows of the table in the module's docstring."""

    @every_map
    @every_dtype
    @pytest.mark.parametrize("poison", NON_FINITE)
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_nan_or_infinity_anywhere_gives_zero(
        self, bounded: Bounded, dtype: torch.dtype, poison: float, place: int
    ) -> None:
        row = torch.tensor([1.0, -2.0, 3.0], dtype=dtype)
        row[place] = poison
        assert torch.equal(bounded(row), torch.zeros(3, dtype=dtype))

    @every_map
    @every_dtype
    def test_zero_gives_zero(self, bounded: Bounded, dtype: torch.dtype) -> None:
        assert torch.equal(bounded(torch.zeros(3, dtype=dtype)), torch.zeros(3, dtype=dtype))

    @every_map
    @every_dtype
    def test_subnormal_gives_finite_within_the_bound(self, bounded: Bounded, dtype: torch.dtype) -> None:
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        for row in (torch.full((3,), least, dtype=dtype), torch.tensor([least, 0.0, -5 * least], dtype=dtype)):
            assert (row != 0).any()
            assert within(bounded(row), bounded.l2_bound)

    @every_map
    @every_dtype
    def test_huge_gives_finite_within_the_bound_in_the_right_direction(
        self, bounded: Bounded, dtype: torch.dtype
    ) -> None:
        largest = torch.finfo(dtype).max
        for weights in ([1.0, 1.0, 1.0], [1.0, -0.5, 0.25], [0.0, -1.0, 1e-3]):
            out = bounded(torch.tensor(weights, dtype=torch.float64).mul(largest).to(dtype))
            assert within(out, bounded.l2_bound)
            wanted = torch.tensor(weights, dtype=torch.float64)
            wanted = wanted / wanted.norm() * bounded.l2_bound
            assert torch.allclose(out.double(), wanted, rtol=1e-6, atol=0.0)

    @every_map
    @every_dtype
    @pytest.mark.parametrize("neighbour", [*NON_FINITE, 0.0, 1e-45, 3e38])
    def test_beside_other_rows_gives_what_it_would_be_alone(
        self, bounded: Bounded, dtype: torch.dtype, neighbour: float
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        own = torch.randn(50, 7, dtype=dtype, generator=generator) * torch.logspace(-6, 6, 50, dtype=dtype)[:, None]
        beside = torch.cat([own, torch.full((1, 7), neighbour, dtype=dtype)])
        alone = torch.stack([bounded(row) for row in own])
        assert same(bounded(beside)[:-1], alone)


@every_dtype
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (0, 0), (2, 0, 3)])
def test_empty_vectors_stay_empty(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for bounded in MAPS.values():
        out = bounded(torch.zeros(shape, dtype=dtype))
        assert out.shape == shape
        assert out.dtype == dtype


@thorough
@given(bounded=any_map, vectors=rows())
def test_no_output_is_longer_than_the_bound(bounded: Bounded, vectors: Tensor) -> None:
    out = bounded(vectors)
    assert out.shape == vectors.shape
    assert out.dtype == vectors.dtype
    assert all(within(row, bounded.l2_bound) for row in out)


@pytest.mark.parametrize("clip_norm", [1e-20, 1e-12, 1e-10, 1e12, 1e20])
@pytest.mark.parametrize("norm", [1e-20, 1.0, 1e20, 4e28, 7e28, 1e30, 3e38])
def test_no_output_is_longer_than_the_bound_for_extreme_radii(clip_norm: float, norm: float) -> None:
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(40, 3, generator=generator), dim=-1)
    bounded = Clip(clip_norm=clip_norm)
    assert all(within(row, clip_norm) for row in bounded(directions * norm))


@every_map
@pytest.mark.parametrize("size", [1, 2, 1000, 50_000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4, 1e35])
def test_no_long_vector_is_longer_than_the_bound(bounded: Bounded, size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(size)
    vectors = torch.randn(4, size, generator=generator) * scale
    for row in bounded(vectors):
        assert math.fsum((row.double() ** 2).tolist()) <= bounded.l2_bound**2 * (1 - 1e-12)


@every_map
def test_the_bound_is_nearly_reached(bounded: Bounded) -> None:
    out = bounded(torch.tensor([[3e37, 4e37], [1e20, 1e20]]))
    assert (out.double().norm(dim=-1) >= bounded.l2_bound * (1.0 - MARGIN)).all()


@thorough
@given(bounded=any_map, vectors=rows(finite=True))
def test_direction_is_kept(bounded: Bounded, vectors: Tensor) -> None:
    tiny = 4.0 * torch.finfo(vectors.dtype).smallest_normal
    for row, out in zip(vectors, bounded(vectors), strict=True):
        assert ((torch.sign(out) == torch.sign(row)) | (out == 0)).all()
        if not len(row) or float(out.abs().max()) < tiny:
            continue
        largest = int(row.abs().argmax())
        wanted = (row.double() / row[largest].double()) * out[largest].double()
        assert torch.allclose(out.double(), wanted, rtol=1e-6, atol=tiny)


@thorough
@given(bounded=any_map, vectors=rows(least=2))
def test_a_row_is_to_the_bit_what_it_is_alone(bounded: Bounded, vectors: Tensor) -> None:
    together = bounded(vectors)
    for row, out in zip(vectors, together, strict=True):
        assert same(bounded(row), out)
        assert same(bounded(row[None])[0], out)


@every_map
@pytest.mark.parametrize("size", [5, 1000, 70_000])
def test_a_long_row_is_to_the_bit_what_it_is_alone(bounded: Bounded, size: int) -> None:
    vectors = torch.randn(5, size, generator=torch.Generator().manual_seed(3))
    vectors[2] *= 1e-3
    together = bounded(vectors)
    assert all(same(bounded(row), out) for row, out in zip(vectors, together, strict=True))
    assert same(bounded(vectors.reshape(5, 1, size))[:, 0], together)


@thorough
@given(
    bounded=any_map,
    row=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
)
def test_formulas_are_exact_in_float64(bounded: Bounded, row: list[float], scale: float) -> None:
    vector = torch.tensor(row, dtype=torch.float64) * scale
    wanted = formula(bounded, vector)
    out = bounded(vector)
    margin = 0.0 if float(wanted.norm()) < bounded.l2_bound * (1.0 - MARGIN) else MARGIN
    assert torch.allclose(out, wanted, rtol=1e-14 + margin, atol=1e-300)


@every_map
def test_formulas_hold_in_float32_up_to_rounding(bounded: Bounded) -> None:
    generator = torch.Generator().manual_seed(5)
    vectors = torch.randn(200, 6, generator=generator) * torch.logspace(-8, 8, 200)[:, None]
    wanted = torch.stack([formula(bounded, row.double()) for row in vectors])
    assert torch.allclose(bounded(vectors).double(), wanted, rtol=MARGIN, atol=1e-40)


@thorough
@given(clip_norm=st.floats(1e-6, 1e6), row=st.lists(numbers(torch.float32, finite=True), min_size=1, max_size=5))
def test_clip_is_the_identity_to_the_bit_inside_the_ball(clip_norm: float, row: list[float]) -> None:
    vector = torch.tensor(row, dtype=torch.float32)
    assume(squared_norm(vector) <= Fraction(clip_norm * (1.0 - MARGIN)) ** 2)
    assert same(Clip(clip_norm=clip_norm)(vector), vector)
    double = vector.double() * (1.0 / 3.0)
    assert same(Clip(clip_norm=clip_norm)(double), double)


@pytest.mark.parametrize("neighbour", [0.0, float("nan"), 3e38, 1e-45])
def test_clip_is_the_identity_inside_the_largest_ball_whoever_is_beside(neighbour: float) -> None:
    vectors = torch.tensor([[1e19, -2e19], [3.0, 1e-45], [9e19, 1e17], [neighbour, neighbour]])
    assert same(Clip(clip_norm=1e20)(vectors)[:3], vectors[:3])


@thorough
@given(bounded=any_map, pair=st.lists(st.floats(-100.0, 100.0), min_size=6, max_size=6), near=st.booleans())
def test_no_two_vectors_move_apart_by_more_than_the_lipschitz_constant(
    bounded: Bounded, pair: list[float], near: bool
) -> None:
    first, second = torch.tensor(pair, dtype=torch.float64).reshape(2, 3)
    if near:
        second = first + 1e-4 * second
    moved = float((bounded(first) - bounded(second)).norm())
    # Rounding of the outputs and of the bound's margin, which clips only vectors at the boundary.
    assert moved <= bounded.lipschitz * float((first - second).norm()) * (1.0 + 1e-9) + bounded.l2_bound * 1e-13


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_the_lipschitz_constant_is_nearly_attained(size: float) -> None:
    pair = torch.tensor([[1e-6, 0.0], [-1e-6, 1e-7]], dtype=torch.float64) * size
    for bounded in (Clip(clip_norm=size), SmoothedNormalization(alpha=size)):
        outs = bounded(pair)
        ratio = float((outs[0] - outs[1]).norm() / (pair[0] - pair[1]).norm())
        assert bounded.lipschitz * (1.0 - 1e-5) <= ratio <= bounded.lipschitz


@pytest.mark.parametrize("size", [0.02, 1.0, 7.0])
def test_the_constants_are_the_papers(size: float) -> None:
    clip, normalization = Clip(clip_norm=size), SmoothedNormalization(alpha=size)
    assert (clip.l2_bound, clip.lipschitz) == (size, 1.0)
    assert (normalization.l2_bound, normalization.lipschitz) == (1.0, 1.0 / size)


@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
def test_maps_are_cocoercive_as_gradients_of_convex_functions_are(size: float) -> None:
    """<B(u) - B(w), u - w> >= a ||B(u) - B(w)||^2, the lemma of record-level privacy: a = alpha, and 1 for clipping."""
    generator = torch.Generator().manual_seed(7)
    scales = 10.0 ** torch.empty(2, 4000, 1, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    first, second = torch.randn(2, 4000, 3, dtype=torch.float64, generator=generator) * scales * size
    for bounded in (Clip(clip_norm=size), SmoothedNormalization(alpha=size)):
        moved = bounded(first) - bounded(second)
        product = (moved * (first - second)).sum(dim=-1)
        slack = product - (moved**2).sum(dim=-1) / bounded.lipschitz
        # The margin of the bound, one part in two million, scales vectors outside the ball.
        assert (slack >= -1e-6 * product.abs().clamp(min=size * 1e-9)).all()


@brief
@given(vectors=rows())
def test_bounding_leaves_its_argument_alone(vectors: Tensor) -> None:
    before = vectors.clone()
    for bounded in MAPS.values():
        bounded(vectors)
    assert same(vectors, before)


@thorough
@given(vectors=rows())
def test_finite_rows_are_those_without_nan_and_infinity(vectors: Tensor) -> None:
    wanted = [[all(math.isfinite(cell) for cell in row)] for row in vectors.tolist()]
    assert finite_rows(vectors).tolist() == wanted


@pytest.mark.parametrize("wrong", [0.0, -1.0, *NON_FINITE])
@pytest.mark.parametrize(("kind", "key"), [(Clip, "clip_norm"), (SmoothedNormalization, "alpha")])
def test_a_size_that_is_not_positive_and_finite_is_refused(kind: type, key: str, wrong: float) -> None:
    with pytest.raises(UserError, match=rf"^method\.{key}: expected a positive number, got .*\.$") as caught:
        kind(**{key: wrong})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [1e-45, 9e-21, 1.1e20, 1e38, 1e300])
def test_a_clip_norm_that_float32_cannot_serve_is_refused(wrong: float) -> None:
    with pytest.raises(UserError, match=r"^method\.clip_norm: expected a number from 1e-20 to 1e20, got "):
        Clip(clip_norm=wrong)


@pytest.mark.parametrize("value", [1e-40, 1e-21, 1e21])
def test_a_parameter_that_float32_cannot_hold_is_refused_because_zero_would_become_nan(value: float) -> None:
    for make in (lambda: SmoothedNormalization(alpha=value), lambda: Clip(clip_norm=value)):
        with pytest.raises(ValueError, match="1e-20 to 1e20"):
            make()
    for edge in (1e-20, 1e20):
        for bounded in (SmoothedNormalization(alpha=edge), Clip(clip_norm=edge)):
            assert torch.equal(bounded(torch.zeros(3)), torch.zeros(3))
