"""What only a GPU can show: the same bits at every run, CUDA graphs, no allocation, no waiting, very large tensors.

The tests of the ops run on a GPU too, by way of ``tests/round_trip.py``.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisher_kernels import MBF, SOFIM, AdaFisher, AdaFisherW, backends, ops, use_backend
from fisher_kernels.optim.base import FisherOptimizer
from fisher_kernels.tools.samples import SAMPLES, Sample, Source
from tests.comparison import assert_same_bits

if not torch.cuda.is_available():
    pytest.skip("there is no GPU: torch.cuda.is_available() is False", allow_module_level=True)

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # those of other libraries on a GPU are not our subject
]

GPU = torch.device("cuda", 0)
RUNS = 10

each_backend = pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
        for name, reason in backends.reasons().items()
        if name in ("cuda", "triton")
    ],
)


def free_memory() -> int:
    return torch.cuda.mem_get_info(GPU)[0]


def needs_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    if free_memory() < gigabytes * 1e9:
        pytest.skip(f"{free_memory() / 1e9:.0f} GB of GPU memory are free, {gigabytes:g} are needed")


# Optimizers, on a network that has a weight for every kind of rule with deterministic derivatives.


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.Tanh(),
        nn.Conv2d(16, 24, 1),
        nn.Flatten(),
        nn.Linear(24 * 8 * 8, 40),
        nn.LayerNorm(40),
        nn.Linear(40, 10),
    )
    return nn.Sequential(*layers).to(GPU)


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    return x.to(GPU), torch.randint(10, (32,), generator=generator).to(GPU)


Make = Callable[[nn.Module], FisherOptimizer]

NEVER = 10**9

REFRESHING: dict[str, Make] = {
    "AdaFisher": lambda model: AdaFisher(model, update_interval=1),
    "AdaFisher, relative": lambda model: AdaFisher(model, variant="relative", update_interval=1),
    "AdaFisher, release": lambda model: AdaFisher(model, variant="release", update_interval=1),
    "AdaFisherW": lambda model: AdaFisherW(model, update_interval=1, weight_decay=0.1),
    "MBF": lambda model: MBF(model, capturable=True, inverse_interval=1),
    "MBF, blocks of columns": lambda model: MBF(model, capturable=True, inverse_interval=1, linear_blocks=16),
}
PLAIN: dict[str, Make] = {
    "AdaFisher": lambda model: AdaFisher(model, update_interval=NEVER),
    "AdaFisherW": lambda model: AdaFisherW(model, update_interval=NEVER, weight_decay=0.1),
    "MBF": lambda model: MBF(model, update_interval=NEVER, inverse_interval=NEVER),
    "MBF, packed": lambda model: MBF(model, update_interval=NEVER, inverse_storage="packed"),
    "MBF, bfloat16": lambda model: MBF(model, update_interval=NEVER, inverse_storage="bfloat16"),
    "SOFIM": lambda model: SOFIM(model.parameters()),
    "SOFIM, tensor, gradient": lambda model: SOFIM(model.parameters(), scope="tensor", direction="gradient", rho=1.0),
}
each_plain = pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
each_refreshing = pytest.mark.parametrize("make", REFRESHING.values(), ids=REFRESHING)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """What is beside our kernels has the same bits at every run too."""
    previous = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = previous


class Trained:
    """A network in training, whose gradients and batch stay where they are: what a CUDA graph can capture."""

    def __init__(self, make: Make) -> None:
        self.model = network()
        self.optimizer = make(self.model)
        self.x, self.y = batch(0)

    def feed(self, number: int) -> None:
        for held, new in zip((self.x, self.y), batch(number), strict=True):
            held.copy_(new)

    def iterate(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def gradients(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for p in self.model.parameters():
            new = torch.randn(p.shape, generator=generator).to(GPU)
            if p.grad is None:
                p.grad = new
            else:
                p.grad.copy_(new)

    def move_gradients(self) -> None:
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad = p.grad.clone()

    def everything(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.model.named_parameters():
            yield name, p.detach()
            for entry, value in self.optimizer.state[p].items():
                if isinstance(value, Tensor):
                    yield f"{entry} of {name}", value


def assert_same(actual: Trained, expected: Trained) -> None:
    for (name, x), (_, y) in zip(actual.everything(), expected.everything(), strict=True):
        assert_same_bits(x, y, name)


@contextmanager
def aside() -> Iterator[None]:
    """Work before a capture goes to another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


WARM_UPS, REPLAYS = 3, 5


@each_backend
@each_plain
def test_a_captured_step_is_the_eager_one(make: Make, kernels: str) -> None:
    with use_backend(kernels):
        eager, captured = Trained(make), Trained(make)
        for number in range(WARM_UPS):
            for trained in (eager, captured):
                trained.feed(number)
                with aside():
                    trained.iterate()
        if kernels == "cuda":
            captured.move_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.optimizer.step()
        for number in range(REPLAYS):
            eager.gradients(number)
            eager.optimizer.step()
            captured.gradients(number)
            graph.replay()
        assert_same(captured, eager)


@each_refreshing
def test_a_captured_iteration_with_a_refresh_is_the_eager_one(make: Make) -> None:
    eager, captured = Trained(make), Trained(make)
    for number in range(WARM_UPS):
        for trained in (eager, captured):
            trained.feed(number)
            with aside():
                trained.iterate()
    assert_same(captured, eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.iterate()
    for number in range(WARM_UPS, WARM_UPS + REPLAYS):
        eager.feed(number)
        eager.iterate()
        captured.feed(number)
        graph.replay()
    assert_same(captured, eager)


@each_plain
def test_triton_refuses_gradients_that_move_while_a_graph_is_captured(make: Make) -> None:
    """Their addresses would have to be uploaded; to CUDA's kernels they are arguments."""
    trained = Trained(make)
    with use_backend("triton"):
        for _ in range(2):
            trained.iterate()
        trained.move_gradients()
        before = copy.deepcopy(trained.model.state_dict())
        refused = pytest.raises(RuntimeError, match=r"while a CUDA graph is captured")
        with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
            trained.optimizer.step()
        torch.cuda.synchronize()
        for name, value in trained.model.state_dict().items():
            assert_same_bits(value, before[name], name)
        trained.optimizer.step()  # which the capture that failed does not prevent
        assert not torch.equal(trained.model[0].weight, before["0.weight"])


def one_step(trained: Trained, number: int) -> None:
    trained.gradients(number)
    trained.optimizer.step()


def one_iteration(trained: Trained, number: int) -> None:
    trained.feed(number)
    trained.iterate()


Do = Callable[[Trained, int], None]
each_kind_of_step = pytest.mark.parametrize(
    ("make", "do"),
    [
        *(pytest.param(make, one_step, id=f"{name}, plain") for name, make in PLAIN.items()),
        *(pytest.param(make, one_iteration, id=f"{name}, refresh") for name, make in REFRESHING.items()),
    ],
)


@each_kind_of_step
def test_steps_after_the_first_ones_take_no_memory(make: Make, do: Do) -> None:
    trained = Trained(make)
    for number in range(WARM_UPS):
        one_iteration(trained, number)
        do(trained, number)

    def measured(number: int) -> tuple[int, int, int]:
        torch.cuda.reset_peak_memory_stats()
        do(trained, number)
        torch.cuda.synchronize()
        statistics = torch.cuda.memory_stats()
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated(), statistics["segment.all.allocated"]

    first = measured(0)
    for number in range(1, RUNS):
        peak, left, segments = measured(number)
        assert segments == first[2], "a step called cudaMalloc"
        assert left <= first[1], "what steps leave behind grows"
        assert peak <= first[0], "the peak grows"


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Whatever waits for the device inside raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_kind_of_step
def test_steps_after_the_first_one_wait_for_nothing(make: Make, do: Do) -> None:
    trained = Trained(make)
    for number in range(2):
        one_iteration(trained, number)
        do(trained, number)
    if do is one_step:
        with nobody_waits():
            trained.optimizer.step()
    else:
        with nobody_waits():
            trained.iterate()


@each_plain
def test_gradients_may_move_between_steps(make: Make) -> None:
    still, moving = Trained(make), Trained(make)
    for number in range(RUNS):
        for trained in (still, moving):
            trained.feed(number)
            trained.optimizer.zero_grad(set_to_none=trained is moving)
            F.cross_entropy(trained.model(trained.x), trained.y).backward()
        moving.move_gradients()
        with nobody_waits() if number > 1 else aside():
            moving.optimizer.step()
        still.optimizer.step()
    assert_same(moving, still)


def test_scaled_steps_wait_for_nothing_and_an_overflow_changes_nothing() -> None:
    trained = Trained(PLAIN["AdaFisher"])
    for number in range(2):
        one_iteration(trained, number)
    trained.optimizer.grad_scale = torch.full((), 1024.0, device=GPU)
    trained.optimizer.found_inf = torch.ones((), device=GPU)
    before = [(name, value.clone()) for name, value in trained.everything()]
    trained.gradients(0)
    trained.optimizer.step()
    with nobody_waits():
        trained.optimizer.step()
    for (name, value), (_, old) in zip(trained.everything(), before, strict=True):
        assert_same_bits(value, old, name)


COMMON: dict[str, Any] = {"weight_decay": 0.1, "decoupled": True, "maximize": False}
STEPS: dict[str, Callable[..., Any]] = {
    "adafisher_step_": lambda w, g, m, t, **numbers: ops.adafisher_step_(
        w, g, m, t, [None] * len(w), [None] * len(w), beta=0.9, damping=0.1, **COMMON, **numbers
    ),
    "mbf_step_": lambda w, g, m, _, **numbers: ops.mbf_step_(
        w, g, m, [torch.ones(x.numel(), 1, 1, device=GPU) for x in w], momentum=0.9, kl_clip=1e-3, **COMMON, **numbers
    ),
    "sofim_step_": lambda w, g, m, t, **numbers: ops.sofim_step_(w, g, m, t, beta=0.9, rho=1.0, **COMMON, **numbers),
    "heavy_ball_": lambda w, g, m, _, lr, **numbers: ops.heavy_ball_(w, g, m, momentum=0.9, **numbers),
    "capped_step_": lambda w, d, m, _, grad_scale, **numbers: ops.capped_step_(
        w, d, ops.direction_sums(w, d, m), [0] * len(w), kl_clip=1e-3, max_relative_step=0.1, **numbers
    ),
}


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", STEPS)
def test_numbers_on_the_device_are_those_of_the_host(op: str, dtype: torch.dtype, kernels: str) -> None:
    def step(where: torch.device, found_inf: float) -> list[Tensor]:
        torch.manual_seed(0)
        lists = [[torch.randn(size).to(GPU) for size in (40_000, 7)] for _ in range(3)]
        lists.append([torch.full((), 3.0, device=GPU) for _ in range(2)])
        numbers = {"lr": 0.1, "grad_scale": 3.0, "found_inf": found_inf}
        held = {name: torch.tensor([value], dtype=dtype, device=where) for name, value in numbers.items()}
        with use_backend(kernels):
            results = STEPS[op](*lists, **held)
        return [*itertools.chain(*lists), *(results if isinstance(results, tuple) else (results,))]

    host = torch.device("cpu")
    for found_inf in (0.0, 1.0):
        for i, (x, y) in enumerate(zip(step(GPU, found_inf), step(host, found_inf), strict=True)):
            assert_same_bits(x, y, f"result {i}")
    assert not torch.equal(step(GPU, 0.0)[0], step(GPU, 1.0)[0])


# The same inputs give the same bits.


def outputs(kernels: str, case: Sample, dtype: torch.dtype, device: torch.device = GPU) -> list[Tensor]:
    inputs = case.inputs(Source(dtype, device))
    with use_backend(kernels):
        return case.call(inputs)


def each_case(test: Callable[..., None]) -> Callable[..., None]:
    cases = [(case, dtype) for case in SAMPLES for dtype in case.dtypes]
    names = [f"{c.op}-{c.name}-{str(d).removeprefix('torch.')}".replace(" ", "_") for c, d in cases]
    return each_backend(pytest.mark.parametrize(("case", "dtype"), cases, ids=names)(test))


@each_case
def test_the_same_bits_at_every_run(kernels: str, case: Sample, dtype: torch.dtype) -> None:
    first = outputs(kernels, case, dtype)
    for run in range(1, RUNS):
        torch.empty(1 << 20, device=GPU).fill_(run)  # other memory, with other contents, is what the next run gets
        for i, (x, y) in enumerate(zip(outputs(kernels, case, dtype), first, strict=True)):
            assert_same_bits(x, y, f"output {i} of run {run}")


@each_backend
def test_the_same_bits_on_large_inputs(kernels: str) -> None:
    """Sums that many programs share, at sizes that fill the device."""
    torch.manual_seed(0)
    x = torch.randn(64, 256, 56, 56, device=GPU)
    rows = torch.randn(1 << 16, 1024, device=GPU, dtype=torch.bfloat16)
    v = torch.randn(64, 4096, 9, device=GPU)
    wide, blocks = torch.empty(1024, 1024, device=GPU), torch.empty(4096, 9, 9, device=GPU)

    def run() -> list[Tensor]:
        ops.weighted_gram_(wide, rows)
        ops.mini_block_gram_(blocks, v)
        return [
            ops.column_sum_of_squares(rows),
            ops.channel_sum_of_squares(x),
            ops.channel_sum_of_squares(x.to(memory_format=torch.channels_last)),
            ops.patch_sum_of_squares(x, 3, 2, 1),
            wide.clone(),
            blocks.clone(),
        ]

    with use_backend(kernels):
        first = run()
        for number in range(1, RUNS):
            for i, (actual, expected) in enumerate(zip(run(), first, strict=True)):
                assert_same_bits(actual, expected, f"output {i} of run {number}")


# Streams and devices.


@pytest.mark.parametrize(
    "make", [PLAIN["AdaFisher"], PLAIN["SOFIM"], REFRESHING["MBF"]], ids=["AdaFisher", "SOFIM", "MBF"]
)
def test_steps_change_streams(make: Make) -> None:
    """Each step waits for the one before through the streams alone, though the device is busy."""
    one, many = Trained(make), Trained(make)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for number, stream in zip(range(2 * len(streams)), itertools.cycle(streams), strict=False):
        one_iteration(one, number)
        many.feed(number)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            many.iterate()
        torch.cuda.current_stream().wait_stream(stream)
    assert_same(many, one)


@pytest.mark.skipif(GPUS < 2, reason="there is one GPU")
@each_case
def test_another_device_than_the_current_one(kernels: str, case: Sample, dtype: torch.dtype) -> None:
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    for x, y in zip(outputs(kernels, case, dtype, other), outputs(kernels, case, dtype), strict=True):
        assert x.device == other
        assert_same_bits(x.cpu(), y.cpu())


# Past 2^31 elements.


@each_backend
def test_more_columns_of_squares_than_32_bits_count(kernels: str) -> None:
    needs_memory(12)
    rows, columns = (1 << 16) + 3, 1 << 15
    torch.manual_seed(0)
    x = torch.empty(rows, columns, dtype=torch.bfloat16, device=GPU).normal_()
    with use_backend(kernels):
        actual = ops.column_sum_of_squares(x)
    expected = torch.zeros(columns, dtype=torch.float64, device=GPU)
    for part in x.split(4096):
        expected += part.double().square_().sum(0)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@each_backend
@pytest.mark.parametrize("op", ["adafisher_step_", "sofim_step_"])
def test_a_step_of_more_elements_than_32_bits_count(op: str, kernels: str) -> None:
    """The ends of one parameter, and one behind it, must be what they are in a small parameter."""
    needs_memory(24)
    rows, columns, end = (1 << 17) + 1, 1 << 14, 3
    torch.manual_seed(0)
    shape = (rows, columns)
    large = {
        "params": torch.empty(shape, dtype=torch.bfloat16, device=GPU).normal_(),
        "grads": torch.empty(shape, dtype=torch.bfloat16, device=GPU).normal_(),
        "exp_avgs": torch.empty(shape, device=GPU).normal_(),
    }
    row, column = torch.rand(rows, device=GPU), torch.rand(columns, device=GPU)
    ends = {name: torch.cat((x[:end], x[-end:])).double() for name, x in large.items()}

    before = {name: x.clone() for name, x in ends.items()}

    def step(tensors: dict[str, Tensor], row: Tensor, square: Tensor | None = None) -> Tensor | None:
        lists: Any = ([x] for x in (*tensors.values(), torch.zeros((), device=GPU)))
        if op == "adafisher_step_":
            options = {"beta": 0.9, "damping": 0.1, "weight_decay": 0.0, "decoupled": False, "maximize": False}
            ops.adafisher_step_(*lists, [row], [column.to(row.dtype)], lr=0.1, **options)
            return None
        rho = 1.0 if square is None else 1.0 + float(square)
        return ops.sofim_step_(*lists, lr=1e11, beta=0.9, rho=rho)[1]  # of the size of the norm

    with use_backend(kernels):
        square = step(large, row)
    # SOFIM's norm is of the whole parameter: beside it that of the ends counts for nothing, so it goes into rho.
    with use_backend("reference"):
        step(ends, torch.cat((row[:end], row[-end:])).double(), square)
    for name in ("params", "exp_avgs"):
        actual = torch.cat((large[name][:end], large[name][-end:]))
        rtol, atol = (2**-8, 5e-3) if name == "params" else (1e-6, 1e-6)
        torch.testing.assert_close(actual.double(), ends[name], rtol=rtol, atol=atol)
        assert not torch.equal(ends[name], before[name])
