"""Gradients of a batch normalisation's scale and shift against their definition in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fisher_kernels import use_backend
from fisher_kernels.ops import batch_norm_gradients
from tests.cases import DTYPES, LAYOUTS, channels_last, contiguous, integers, random, zeros_without_memory
from tests.comparison import assert_same_bits, assert_within, unit_roundoff

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

EPS = 1e-5
# Around the sizes of registers, of runs of registers, and of channels beside them.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 1),
    (5, 3),
    (70, 35),
    (3, 5, 1),
    (2, 3, 2, 2),
    (3, 17, 3, 5),
    (4, 3, 4, 4),
    (3, 2, 17),
    (2, 16, 31),
    (2, 5, 7, 19),
    (2, 20, 3, 3, 5),
    (1, 2, 1100),
    (2, 2, 2051),
)
EMPTY: tuple[tuple[int, ...], ...] = ((0, 3), (0, 3, 4), (3, 0), (3, 4, 0), (2, 3, 4, 0), (0, 0, 0))


def defined(x: Tensor, grad: Tensor, eps: float, *given: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: the reference in float64."""
    with use_backend("reference"):
        return batch_norm_gradients(x.double(), grad.double(), eps, *given)


def bounds(x: Tensor, grad: Tensor, eps: float, u: float, roundings: int, *given: Tensor) -> tuple[Tensor, Tensor]:
    """How far sums may lie from their definition.

    A lane adds at most 128 numbers, at a rounding each, before float64 takes over; a few roundings are those of
    differences, products and of the sums of lanes. All are relative to sums of magnitudes. What the mean misses is
    relative to the deviation, and to the square of rounding beside the mean itself, as the sum of distances corrects
    it; it multiplies the sum of the gradients. The variance is as far off.
    """
    dims = [0, *range(2, x.dim())]
    shape = (1, -1, *[1] * (x.dim() - 2))
    wide, size = x.double(), grad.double().abs()
    mean = given[0].double() if given else wide.mean(dims)
    distance = (wide - mean.view(shape)).abs()
    variance = given[1].double() if given else distance.square().mean(dims)
    inverse = (variance + eps).rsqrt()
    if not given:
        distance = distance + (variance.sqrt() + roundings * u * mean.abs()).view(shape)
    products, sums = ((v.flatten(2).sum(2) if v.dim() > 2 else v) for v in (size * distance, size))
    return 2 * roundings * u * products * inverse, roundings * u * sums


def check(implementation: str, x: Tensor, grad: Tensor, what: str = "", *given: Tensor, eps: float = EPS) -> None:
    before = x.clone(), grad.clone()
    actual = batch_norm_gradients(x, grad, eps, *given)
    dtype = torch.float64 if torch.float64 in (x.dtype, grad.dtype) else torch.float32
    given = tuple(v.to(dtype) for v in given)
    expected = defined(x, grad, eps, *given)
    # PyTorch's own sums promise no more than a rounding for each number, and float64 has nothing wider above it.
    exact = implementation == "reference" or dtype == torch.float64
    roundings = 140 + (x.numel() // x.shape[1] if exact else 0)
    allowed = bounds(x, grad, eps, unit_roundoff(dtype), roundings, *given)
    for name, a, e, bound in zip(("scale", "shift"), actual, expected, allowed, strict=True):
        assert a.dtype == dtype
        assert a.is_contiguous()
        assert_within(a, e, bound, f"{what}: {name}")
    assert_same_bits(x, before[0], f"{what}: x")
    assert_same_bits(grad, before[1], f"{what}: grad_output")


def statistics(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random((channels,), dtype, 3), random((channels,), dtype, 4).abs()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape: tuple[int, ...]) -> None:
    """Summed over samples it is what autograd says of batch_norm, in both modes."""
    x, grad = random(shape, torch.float64), random(shape, torch.float64, 1)
    if x.numel() == x.shape[1]:
        return  # batch_norm refuses a single number per channel
    for given in ((), statistics(shape[1], torch.float64)):
        weight, bias = (torch.ones(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
        mean, variance = given or (None, None)
        out = torch.nn.functional.batch_norm(x, mean, variance, weight, bias, training=not given, eps=EPS)
        for sums, expected in zip(
            defined(x, grad, EPS, *given), torch.autograd.grad(out, (weight, bias), grad), strict=True
        ):
            torch.testing.assert_close(sums.sum(0), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_layout(implementation: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for name, layout in LAYOUTS.items():
        x, grad = layout(random(shape, dtype)), layout(random(shape, dtype, 1))
        check(implementation, x, grad, name)
        check(implementation, x, grad, f"{name}, given", *statistics(shape[1]))


def apart(x: Tensor) -> Tensor:
    """Contiguous samples, each of them one element off the one before."""
    return x.new_full((len(x), x[0].numel() + 1), math.nan)[:, 1:].view(x.shape).copy_(x)


def apart_last(x: Tensor) -> Tensor:
    return apart(x.movedim(1, -1)).movedim(-1, 1)


# On a GPU: channels of more than one piece of 4096 positions, or 2048 where they are side by side; more samples than a
# block of threads has; as many positions as lanes share, and one more; channels that fill lanes, and one more.
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)], ids=str
)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 4096), (2, 3, 4104), (1, 2, 8195), (300, 36), (300, 35), (130, 8, 3), (700, 130, 1), (3, 128, 8),
     (3, 129, 16), (2, 256, 33), (70, 3, 64), (70, 5, 72)],
    ids=str,
)  # fmt: skip
def test_pieces_and_lanes_of_a_gpu(
    cuda_backend: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    x, grad = random(shape, dtypes[0]), random(shape, dtypes[1], 1)
    for layout in (contiguous, channels_last, apart, apart_last):
        check(cuda_backend, layout(x), layout(grad), layout.__name__)
        check(cuda_backend, layout(x), layout(grad), f"{layout.__name__}, given", *statistics(shape[1]))


def test_layouts_that_differ(implementation: str) -> None:
    names = LAYOUTS if implementation != "triton" else ("contiguous", "transposed", "channels_last")  # others take long
    for shape in ((3, 17, 3, 5), (2, 3, 17)):
        x, grad = random(shape, torch.float32), random(shape, torch.float32, 1)
        for (left, one), (right, other) in itertools.permutations(((name, LAYOUTS[name]) for name in names), 2):
            check(implementation, one(x), other(grad), f"{left}, {right}")


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_dtypes_that_differ(implementation: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for shape in ((70, 35), (3, 17, 3, 5), (2, 5, 7, 19)):
        for layout in (contiguous, channels_last):
            x, grad = layout(random(shape, dtypes[0])), layout(random(shape, dtypes[1], 1))
            check(implementation, x, grad, str(shape))
            check(implementation, x, grad, f"{shape}, given", *statistics(shape[1], torch.float64))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("ratio", [1e3, 1e5])
@pytest.mark.slow_interpreted
def test_large_means(implementation: str, ratio: float, layout: Callable[[Tensor], Tensor]) -> None:
    """Nothing cancels: the error is relative to the deviation, as if the mean were none."""
    samples = 16 if implementation == "triton" else 64  # interpreted, more take long
    for shape in ((70, 35), (3, 17, 3, 5), (samples, 5, 8, 8), (2, 2, 2051)):
        x = random(shape, torch.float32) + ratio
        check(implementation, layout(x), layout(random(shape, torch.float32, 1)), str(shape))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("shape", [(17, 3, 5), (24, 2, 8, 8)], ids=str)
def test_samples_unlike_the_rest(implementation: str, shape: tuple[int, ...], first: int) -> None:
    """Some samples may stand for the mean: where they are far from it, what they miss is still within the deviation."""
    x, grad = torch.randn(shape), torch.randn(shape)
    x[first::8] += 1e4
    check(implementation, x, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.slow_interpreted
def test_sums_of_whole_numbers_are_exact(implementation: str, dtype: torch.dtype) -> None:
    for shape, layout in itertools.product(SHAPES, (contiguous, channels_last)):
        x, grad = layout(integers(shape, dtype)), layout(integers(shape, dtype, 1))
        mean, variance = integers((shape[1],), torch.float32, 2), torch.full((shape[1],), 0.25)
        for a, e in zip(
            batch_norm_gradients(x, grad, 0.0, mean, variance), defined(x, grad, 0.0, mean, variance), strict=True
        ):
            assert_within(a, e, 0.0, f"{shape}")


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_empty(implementation: str, shape: tuple[int, ...], given: bool) -> None:
    x = torch.ones(shape)
    for out in batch_norm_gradients(x, x, 0.0, *(statistics(shape[1]) if given else ())):
        assert_same_bits(out, torch.zeros(shape[:2]))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_what_is_not_finite_stays_where_it_is(
    implementation: str, value: float, layout: Callable[[Tensor], Tensor]
) -> None:
    for shape in ((5, 35, 1), (5, 19, 7), (5, 3, 37)):
        x, grad = random(shape, torch.float32), random(shape, torch.float32, 1)
        bad_x, bad_grad = x.clone(), grad.clone()
        bad_x[2, 1, -1] = bad_grad[2, 1, -1] = value
        channel, sample = torch.zeros(shape[:2], dtype=torch.bool), torch.zeros(shape[:2], dtype=torch.bool)
        channel[:, 1], sample[2, 1] = True, True
        for given in ((), statistics(shape[1])):
            clean = batch_norm_gradients(layout(x), layout(grad), EPS, *given)
            scale, shift = batch_norm_gradients(layout(bad_x), layout(grad), EPS, *given)
            assert torch.equal(~scale.isfinite(), sample if given else channel)
            assert torch.equal(scale[scale.isfinite()], clean[0][scale.isfinite()])
            assert_same_bits(shift, clean[1])
            mean = given[0][1] if given else x[:, 1].mean()
            results = value * (x[2, 1, -1] - mean).sign(), torch.tensor(value)  # an infinite one stays infinite
            found = batch_norm_gradients(layout(x), layout(bad_grad), EPS, *given)
            for bad, good, result in zip(found, clean, results, strict=True):
                assert torch.equal(~bad.isfinite(), sample)
                assert torch.equal(bad[~sample], good[~sample])
                torch.testing.assert_close(bad[2, 1], result, rtol=0, atol=0, equal_nan=True)


def test_a_constant_channel(implementation: str) -> None:
    for shape in ((4, 20), (4, 20, 3), (4, 20, 33)):
        x, grad = torch.full(shape, 1234.5678), random(shape, torch.float32)
        scale, _ = batch_norm_gradients(x, grad, EPS)
        assert_within(scale, torch.zeros(shape[:2], dtype=torch.float64), 1e-3)


def test_same_bits_for_every_number_of_threads(set_threads: Callable[[int], None]) -> None:
    for shape, layout in itertools.product(((64, 100, 33), (64, 100, 3), (6400, 40)), (contiguous, channels_last)):
        x, grad = layout(random(shape, torch.float32)), layout(random(shape, torch.float32, 1))
        set_threads(1)
        first = batch_norm_gradients(x, grad, EPS)
        for threads in (2, 3, 5):
            set_threads(threads)
            for a, b in zip(batch_norm_gradients(x, grad, EPS), first, strict=True):
                assert_same_bits(a, b, f"{shape}, {threads} threads")


def test_samples_more_than_2_to_31_elements_apart(backend: str) -> None:
    samples, stride = 3, 2**30 + 7
    for strides in ((stride, 9, 1), (stride, 1, 5)):
        x = zeros_without_memory((samples - 1) * stride + 45).as_strided((samples, 5, 9), strides)
        x.copy_(integers(x.shape, x.dtype))
        mean, variance = torch.zeros(5), torch.ones(5)
        scale, shift = batch_norm_gradients(x, x, 0.0, mean, variance)
        assert torch.equal(scale, x.float().square().sum(2))
        assert torch.equal(shift, x.float().sum(2))
