"""Lists of tensors as kernels see them: tables of addresses and sizes on the device, cut into chunks.

A launch takes tables instead of tensors, so that a list of any length is one launch. What follows from shapes, strides
and dtypes (the layout) is made once; addresses, which gradients change from step to step, are uploaded when they do.
"""

from __future__ import annotations

import functools
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._language import divmod_from

CHUNK = tl.constexpr(8192)
"""Elements of a tensor that one program works on."""
WALKED = tl.constexpr(3)
"""How many lists are walked together: parameters, gradients, moments."""
DIMS = tl.constexpr(6)
"""Dimensions of a strided tensor that are left when neighbours in memory are joined: at most so many."""

_SLOTS = 64  # lists that are remembered for each op; a training loop has a few

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
WIDE = {dtype: tl.float64 if dtype == torch.float64 else tl.float32 for dtype in TYPES}


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums and directions have beside a tensor."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@triton.jit
def address(addresses, count, which: tl.constexpr, i, T: tl.constexpr):
    """Where tensor i of a list lies."""
    return tl.load(addresses + which * count + i).to(tl.pointer_type(T))


@triton.jit
def number(addresses, count, which: tl.constexpr, i, mask=None):
    """What the numbers of a table have for tensor i: after the lists, in their order."""
    return tl.load(addresses + which * count + i, mask).to(tl.float64, bitcast=True)


@triton.jit
def is_aligned(pointer):
    """Whether 16 bytes at a time can be read from here on."""
    return pointer.to(tl.int64) % 16 == 0


@triton.jit
def are_aligned(first, second, third):
    """The same for three at once."""
    return (first.to(tl.int64) | second.to(tl.int64) | third.to(tl.int64)) % 16 == 0


@triton.jit
def locate(geometry, i, start, lanes):
    """Elements start + lanes of strided tensors: offsets as if contiguous, then in each of the three lists."""
    table = geometry + i.to(tl.int64) * (WALKED + 2) * DIMS
    whole = tl.zeros_like(lanes).to(tl.int64)
    first, second, third = whole, whole, whole
    carry = lanes
    for k in tl.static_range(DIMS):
        dim = table + (DIMS - 1 - k)
        size = tl.load(dim)
        carry, digit = divmod_from(start % size, carry, size)
        start = start // size
        whole += digit * tl.load(dim + DIMS)
        first += digit * tl.load(dim + 2 * DIMS)
        second += digit * tl.load(dim + 3 * DIMS)
        third += digit * tl.load(dim + 4 * DIMS)
    return whole, first, second, third


@triton.jit
def locate_in_order(geometry, i, start, lanes):
    """Elements start + lanes in row-major order, wherever they lie: offsets in each of the three lists."""
    table = geometry + i.to(tl.int64) * (WALKED + 2) * DIMS
    first = tl.zeros_like(lanes).to(tl.int64)
    second, third = first, first
    for k in tl.static_range(DIMS):
        dim = table + k
        size = tl.load(dim)
        if size > 1:
            run = tl.load(dim + DIMS)  # elements for which the index of this dimension stays
            steps, _ = divmod_from(start % run, lanes, run)
            _, digit = divmod_from(start // run % size, steps, size)
            first += digit * tl.load(dim + 2 * DIMS)
            second += digit * tl.load(dim + 3 * DIMS)
            third += digit * tl.load(dim + 4 * DIMS)
    return first, second, third


class Cut(NamedTuple):
    """A tensor as one kernel takes it."""

    tensor: int
    kind: Any  # which instance of which kernel, where dtype and strides do not say
    programs: int  # that divide it among themselves


class Layout(NamedTuple):
    """How kernels take lists of tensors that are not walked element by element."""

    rows: Sequence[Sequence[int]]  # for each tensor, what a kernel reads beside its size
    cuts: Sequence[Cut]
    notes: Any = None  # what else the op wants to find again


class Launches(NamedTuple):
    """A range of the chunks: all of tensors that one instance of a kernel works on."""

    dtype: Any  # of Triton, that of the first list
    wide: Any  # the one that sums and moments have beside it
    strided: bool
    chunks: Tensor  # int32 (programs, 2): the tensor, and the chunk of it


@dataclass
class Table:
    """Everything on the device that a launch over some lists of tensors reads.

    Attributes:
        count: how many tensors each list has.
        addresses: int64 (lists, count), 0 where a list has None; then the bits of numbers, a row for each list of them.
        layout: int64 (count, width): the size of each tensor, then what the op adds.
        geometry: int64 (count, WALKED + 2, DIMS) where a tensor is strided: sizes, strides in the order in
            which a tensor lies as if it were contiguous, then the strides of each list; dimensions of size 1 first.
        launches: one for each dtype and kind.
        kinds: of each of the launches, that of its cuts.
        notes: those of the layout.
    """

    count: int
    addresses: Tensor
    layout: Tensor
    geometry: Tensor
    launches: list[Launches]
    kinds: list[Any]
    notes: Any


_dtype = attrgetter("dtype")


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    try:
        return list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
    except TypeError:
        return [0 if x is None else x.data_ptr() for x in tensors]


def _bits(numbers: Sequence[float]) -> list[int]:
    return list(struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers)))


def _signature(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """All of a list that its layout depends on."""
    try:
        return tuple(map(Tensor.size, tensors)), tuple(map(Tensor.stride, tensors)), tuple(map(_dtype, tensors))  # type: ignore[arg-type]
    except TypeError:
        return tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors)


def _fill_memory_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether the elements of all are the same stretch of memory in the same order, without gaps."""
    first = tensors[0]
    dims = sorted((stride, size) for size, stride in zip(first.shape, first.stride(), strict=True) if size != 1)
    filled = 1
    for stride, size in dims:
        if stride != filled:
            return False
        filled *= size
    return all(x.stride() == first.stride() for x in tensors)


def _join(tensors: Sequence[Tensor], row_major: bool = False) -> list[tuple[int, ...]]:
    """Dimensions as (size, contiguous stride, stride of each tensor), joined.

    Unless they are to be in row-major order they are in the memory order of the first tensor: elements next to each
    other there stay so, whatever the order of its dimensions.
    """
    first = tensors[0]
    whole, dims = 1, []
    for d in reversed(range(first.dim())):
        if first.shape[d] != 1:
            dims.append((first.shape[d], whole, *(x.stride(d) for x in tensors)))
        whole *= first.shape[d]
    dims.sort(key=lambda dim: (-dim[1],) if row_major else (-dim[2], -dim[1]))
    joined: list[tuple[int, ...]] = []
    for dim in dims:
        size, strides = dim[0], dim[1:]
        if joined and all(outer == size * inner for outer, inner in zip(joined[-1][1:], strides, strict=True)):
            joined[-1] = (joined[-1][0] * size, *strides)
        else:
            joined.append(dim)
    return joined


def is_strided(tensors: Sequence[Tensor]) -> bool:
    """Whether any of the tensors lies otherwise than in row-major order without gaps."""
    return not all(x.is_contiguous() for x in tensors)


def element_chunks(size: int) -> int:
    """Programs for a tensor of which each takes CHUNK elements."""
    return -(-size // CHUNK.value)


def _chunks(cuts: Sequence[Cut]) -> Tensor:
    """The chunks of some tensors, int32 (programs, 2)."""
    counts = _on_host([cut.programs for cut in cuts])
    starts = counts.cumsum(0) - counts
    chunk = torch.arange(int(counts.sum()), device="cpu") - starts.repeat_interleave(counts)
    return torch.stack((_on_host([cut.tensor for cut in cuts]).repeat_interleave(counts), chunk), 1).to(torch.int32)


def _on_host(numbers: Sequence[Any]) -> Tensor:
    """Whole numbers on the CPU, whatever the default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nothing waits for."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph rather than to the device."""
    return device.type != "cpu" and torch.cuda.is_current_stream_capturing()


class _Slot:
    """The table of one call, for as long as calls of it look alike."""

    def __init__(self, op: str, signature: Any, device: torch.device) -> None:
        self.op, self.signature, self.device = op, signature, device
        self.pointers: list[list[int]] | None = None
        self.table: Table | None = None
        self.stream: int | None = None
        self.ready: Any = None

    def refuse_capture(self, what: str) -> None:
        if is_capturing(self.device):
            raise RuntimeError(
                f"{self.op}: {what} while a CUDA graph is captured, expected the tensors of a call before the capture, "
                "whose addresses are on the device already; make one call with them first, and keep gradients where "
                "they are (zero_grad(set_to_none=False))"
            )

    def lay_out(
        self,
        lists: Sequence[Sequence[Tensor | None]],
        layout: Sequence[Sequence[int]] | Layout,
        sums: bool,
        places: bool,
    ) -> None:
        """Everything but the addresses."""
        firsts: Sequence[Any] = lists[0]
        sizes = [x.numel() for x in firsts]
        if not isinstance(layout, Layout):
            layout = Layout(layout, [Cut(i, None, element_chunks(size)) for i, size in enumerate(sizes)])
        walked: list[Any] = list(zip(*lists[: WALKED.value], strict=True))
        as_they_lie = sums and not places
        strided = [is_strided(tensors) and not (as_they_lie and _fill_memory_alike(tensors)) for tensors in walked]
        kinds: dict[tuple[torch.dtype, bool, Any], list[Cut]] = {}
        for cut in layout.cuts:
            if cut.programs:
                kinds.setdefault((firsts[cut.tensor].dtype, strided[cut.tensor], cut.kind), []).append(cut)
        geometry = [self.geometry(i, tensors, sums) for i, tensors in enumerate(walked)] if any(strided) else []
        rows = [(size, *row) for size, row in zip(sizes, layout.rows, strict=True)]
        self.table = Table(
            len(firsts),
            _on_host([]),
            _upload(_on_host(rows), self.device),
            _upload(torch.stack(geometry) if geometry else _on_host([]), self.device),
            [
                Launches(TYPES[dtype], WIDE[dtype], strided, _upload(_chunks(cuts), self.device))
                for (dtype, strided, _), cuts in kinds.items()
            ],
            [kind for _, _, kind in kinds],
            layout.notes,
        )

    def geometry(self, i: int, tensors: Sequence[Tensor], row_major: bool) -> Tensor:
        dims = _join(tensors, row_major)
        if len(dims) > DIMS.value:
            raise ValueError(
                f"{self.op}: tensor {i} of shape {tuple(tensors[0].shape)} has strides "
                f"{', '.join(str(x.stride()) for x in tensors)}, expected at most {DIMS.value} dimensions that are not "
                "next to each other in memory; make it contiguous"
            )
        empty = (1, *[0] * (len(tensors) + 1))
        return _on_host([*[empty] * (DIMS.value - len(dims)), *dims]).T

    def address(
        self,
        lists: Sequence[Sequence[Tensor | None]],
        pointers: list[list[int]],
        layout: Callable[[], object],
        written: Sequence[int],
    ) -> Table:
        """The table with these addresses, on the current stream."""
        assert self.table is not None
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)
        if pointers != self.pointers:
            self.check_devices(lists, layout)
            for tensors, places in zip(lists, pointers, strict=False):
                self.check_memory(tensors, places)
            if any(len(set(pointers[k])) < len(pointers[k]) for k in written):
                layout()  # refuses what is there twice, by its name
            self.refuse_capture("addresses or numbers changed")
            self.pointers = None
            self.table.addresses = _upload(_on_host(pointers), self.device)
            self.pointers = pointers
            if stream is not None:
                self.stream, self.ready = stream.cuda_stream, stream.record_event()
        elif stream is not None and stream.cuda_stream != self.stream and not is_capturing(self.device):
            # (A capture begins with the device idle.) Another stream waits for the upload, and keeps the memory.
            stream.wait_event(self.ready)
            for tensor in self.tensors():
                tensor.record_stream(stream)
        if is_capturing(self.device):
            _captured.append(self.tensors())
        return self.table

    def check_devices(self, lists: Sequence[Sequence[Tensor | None]], layout: Callable[[], object]) -> None:
        """Addresses of other devices look like all others; the op knows what to call the tensor."""
        others = [x.device for tensors in lists for x in tensors if x is not None and x.device != self.device]
        if others:
            layout()
            raise ValueError(f"{self.op}: a tensor is on {others[0]}, expected {self.device}, the device of the first")

    def check_memory(self, tensors: Sequence[Tensor | None], places: Sequence[int]) -> None:
        """A tensor whose storage was freed, or never was, lies at 0."""
        if 0 in places:
            for x, place in zip(tensors, places, strict=True):
                if x is not None and place == 0 and x.numel() and not x.is_meta:
                    raise ValueError(f"{self.op}: a tensor of shape {tuple(x.shape)} has no memory to read")

    def tensors(self) -> list[Tensor]:
        table = self.table
        assert table is not None
        return [table.addresses, table.layout, table.geometry, *(entry.chunks for entry in table.launches)]


@functools.cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    made = torch.ones((), dtype=dtype, device=device)
    if device.type != "cpu" and not is_capturing(device):
        torch.cuda.current_stream(device).synchronize()  # once: other streams will read it
    return made


def one(like: Tensor) -> Tensor:
    """A 1 in the wide dtype beside that of a tensor, on its device; the same at every call."""
    return _one(wide_dtype(like), like.device)


_slots: dict[str, OrderedDict[Any, _Slot]] = {}
_captured: list[list[Tensor]] = []  # kept until the process ends, as there is no telling when a graph is gone


def table(
    op: str,
    lists: Sequence[Sequence[Tensor | None]],
    layout: Callable[[], Sequence[Sequence[int]] | Layout],
    key: Any = None,
    numbers: Sequence[Sequence[float]] = (),
    sums: bool = False,
    places: bool = False,
    written: Sequence[int] = (),
) -> Table:
    """The table of a call over lists of tensors, made anew only if they do not look as at the call before.

    Args:
        op: for errors, and to tell the lists of one op from those of another.
        lists: of one length that is not 0, of tensors on one device; None where there is none. The first WALKED lists
            have no None, and their tensors one shape: their elements are walked together.
        layout: checks the lists and gives for each tensor what a kernel reads beside its size, as many whole numbers
            for all of them, with the chunks where they are not of CHUNK elements. Called only where the lists look new.
        key: whatever else the layout depends on.
        numbers: lists of numbers, one for each tensor, which go to the device when they change, as addresses do.
        sums: whether a kernel adds elements up. Then the order in which they are walked does not follow the strides of
            one list: it is row-major, or that of memory for tensors that fill their memory alike.
        places: whether a kernel asks for the row-major place of each element, so that order is that in any case.
        written: which of the lists are written, in which ``layout`` lets no tensor be there twice.

    Raises:
        RuntimeError: the addresses are not on the device yet and a CUDA graph is being captured.
        ValueError: a tensor lies in memory in a way that is not handled; what ``layout`` raises.
    """
    signature = (tuple(map(_signature, lists)), key)
    pointers = [*map(_addresses, lists), *map(_bits, numbers)]
    slots = _slots.setdefault(op, OrderedDict())
    # Where the first tensor is tells groups of parameters apart; all the rest is compared.
    first: Any = lists[0][0]
    device = first.device
    place = (len(lists[0]), pointers[0][0], device)
    slot = slots.get(place)
    if slot is None or slot.signature != signature:
        made = layout()
        slot = _Slot(op, signature, device)
        slot.refuse_capture("lists that were not seen before")
        slot.lay_out(lists, made, sums, places)
        slots[place] = slot
    slots.move_to_end(place)
    while len(slots) > _SLOTS:
        slots.popitem(last=False)
    return slot.address(lists, pointers, layout, written)
