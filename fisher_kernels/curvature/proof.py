"""Whether a layer computes what its class documents: its operation is done again and compared with its output.

A rule knows the derivative of a class's own operation. A subclass that pads its input, normalises another dimension or
applies an activation is still an instance of that class, and its statistics would be those of another layer. So the
first time that a layer is read, its class's operation is done again on the input that was captured, with the parameters
that the module holds, and must agree with the output up to rounding.

A look leaves no trace: no buffer is written, no random number drawn, no parametrisation evaluated, no collective
called, and modes around the forward (selective checkpointing counts operations) do not see it. It reads a bounded
sample. Output that is the same for every row proves nothing, as zero weights hide whatever a layer does besides. Of a
layer that processes divide among them all of input, weight and output is gathered: that one look they have together.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.nn import functional as F

from fisher_kernels.curvature.gathered import all_of
from fisher_kernels.curvature.rules import Product, is_transposed_linear, unsqueeze_batch
from fisher_kernels.ops import ACCUMULATOR

SAMPLE_BYTES = 8 << 20
"""How much of a layer's input and output is compared, where one sample or channel is not more."""

FLOOR = 0.01
"""Rows and channels that are smaller than this share of the mean one are compared with that."""

TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest relative deviation of a row or channel that rounding explains, by the precision that was worked in."""

Key = tuple[bool, int, torch.dtype, torch.dtype | None]
"""A state that a layer was seen in: training, dimensions of its input, its dtype, the dtype of autocast if it is on."""


class MisfitError(Exception):
    """A layer is found not to compute what its class documents; the message says how."""


class Comparison(NamedTuple):
    """What a layer should have made of a sample, and what it made of it, both as (rows, channels)."""

    expected: Tensor
    output: Tensor


class Verdict(NamedTuple):
    """The outcome of one comparison, on the device.

    Attributes:
        figures: the largest relative deviation, and 1 if the output differs from row to row, else 0.
        precision: that was worked in, a key of ``TOLERANCES``.
        name: of the class whose operation was done again.
    """

    figures: Tensor
    precision: str
    name: str = ""

    def agrees(self) -> bool | None:
        """Whether they agree, which waits for the device; None where that proves nothing."""
        deviation, varies = self.figures.tolist()
        return None if not varies or math.isnan(deviation) else deviation <= TOLERANCES[self.precision]


class Proof:
    """What is known of one layer.

    Attributes:
        reason: why the layer must not be served; None as long as nothing speaks against it.
        overridden: that it is what the user says whatever is found; a deviation is then noted and nothing else.
        deviation: what was found and overridden.
        failed: whether its statistics raised an error.
        proven: state -> number of the refresh in which the layer was last found right in it.
        pending: verdicts that are still on the device.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.overridden = False
        self.deviation: str | None = None
        self._inner = self.failed = False
        self.proven: dict[Key, int] = {}
        self.pending: dict[Key, tuple[int, Verdict]] = {}

    def holds(
        self, module: nn.Module, x: Tensor, output: Tensor, refresh: int, operation: nn.Module | None = None
    ) -> bool:
        """Whether nothing speaks against the layer, which is looked at again if that is due.

        It is due in a state in which the layer was not found right yet, and once in refreshes 1, 2, 4, 8 and so on:
        gates, adapters and observers may change what a layer does.

        Args:
            operation: what the layer is taken for, as a layer of torch's own class; None for itself.
        """
        key = _key(module, x)
        if (
            self.reason is None
            and self.proven.get(key, 0) < 1 << (refresh.bit_length() - 1)
            and key not in self.pending
        ):
            try:
                verdict = compare(module if operation is None else operation, x, output)
            except MisfitError as error:
                self.object(str(error))
            else:
                if verdict is not None:
                    self.pending[key] = refresh, verdict
                    if verdict.figures.is_cpu:
                        settle([self])
        return self.reason is None

    @property
    def inner(self) -> bool:
        """Whether functions were seen to apply the layer's weight: they serve it if something speaks against it.

        Not where statistics failed, as theirs would too.
        """
        return self._inner and not self.failed

    @inner.setter
    def inner(self, seen: bool) -> None:
        self._inner = seen

    def object(self, reason: str) -> None:
        """Note what speaks against the layer."""
        if self.overridden:
            self.deviation = self.deviation or reason
        else:
            self.reason = self.reason or reason

    def fail(self, error: Exception) -> None:
        """Note that the layer must not be served, because its statistics raised an error.

        Errors of memory are raised again, and with FISHER_KERNELS_RAISE=1 in the environment all are.
        """
        # On the CPU torch has no type of its own for the former.
        exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if exhausted or os.environ.get("FISHER_KERNELS_RAISE") == "1":
            raise error
        if self.reason is None:
            self.reason = f"its statistics raise {type(error).__name__}: {_first_line(error)}"
        self.failed = True


def settle(proofs: Iterable[Proof]) -> None:
    """Read verdicts, once for each device; none while a CUDA graph is captured, where nothing can be read."""
    waiting = [(proof, *found) for proof in proofs for found in proof.pending.items()]
    by_device: dict[torch.device, list[tuple[Proof, Key, tuple[int, Verdict]]]] = {}
    for entry in waiting:
        by_device.setdefault(entry[2][1].figures.device, []).append(entry)
    for device, entries in by_device.items():
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            continue
        figures = torch.stack([verdict.figures for *_, (_, verdict) in entries]).tolist()
        for (proof, key, (refresh, verdict)), (deviation, varies) in zip(entries, figures, strict=True):
            proof.pending.pop(key, None)
            if math.isnan(deviation):
                continue
            if deviation > TOLERANCES[verdict.precision]:
                proof.object(
                    f"its output is off by {deviation:.2g} from what {verdict.name} computes "
                    f"(tolerance {TOLERANCES[verdict.precision]:g}, {verdict.precision})"
                )
            elif varies:
                proof.proven[key] = refresh


def choose(candidates: Sequence[nn.Module], x: Tensor, output: Tensor) -> nn.Module | None:
    """The first of several operations that agrees with what a layer made of its input; None where none does."""
    for candidate in candidates:
        try:
            verdict = compare(candidate, x, output)
        except MisfitError:
            continue
        if verdict is not None and verdict.agrees():
            return candidate
    return None


def _key(module: nn.Module, x: Tensor) -> Key:
    autocast = None
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(device := x.device.type):
        autocast = torch.get_autocast_dtype(device)
    return module.training, x.dim(), x.dtype, autocast


_BASES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.SyncBatchNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.Embedding,
    Product,
)


def class_of_torch(module: nn.Module) -> type[nn.Module] | None:
    """The class of torch whose operation a module is taken for."""
    return next((base for base in _BASES if isinstance(module, base)), None)


def _class_name(module: nn.Module) -> str:
    base = class_of_torch(module)
    if base is None:
        return type(module).__name__
    # Families have private bases; the public class is the one of torch that the module's class derives from.
    own = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules")), base)
    return f"nn.{own.__name__}"


# The comparison.


@contextmanager
def _unseen() -> Iterator[None]:
    """Nothing is recorded, and no mode or subclass sees what is done."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


def compare(module: nn.Module, x: Tensor, output: Tensor) -> Verdict | None:
    """Do the operation of a module's class again and compare; None where nothing can be said.

    Raises:
        MisfitError: the class cannot take this input, or would make an output of another shape.
    """
    if x.numel() == 0 or output.numel() == 0 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    tensors: dict[str, Tensor] = {
        name: p for name in ("weight", "bias") if (p := module._parameters.get(name)) is not None
    }
    if _is_split(output):
        if any(type(placement).__name__ == "_MaskPartial" for placement in cast(Any, output).placements):
            _require_own_forward(module, "its output can be read once")
            return None
        tensors = {name: _all_on(t, output) for name, t in tensors.items()}
        x, output = all_of(x), all_of(output)
    local = {name: _local(t) for name, t in {**tensors, "x": x, "output": output}.items()}
    if any(t is None for t in local.values()):
        return None
    parts = any(local[name] is not t for name, t in {**tensors, "x": x, "output": output}.items() if _is_split(t))
    plain: dict[str, Any] = {name: t.detach() for name, t in local.items() if t is not None}
    x, output = plain.pop("x"), plain.pop("output")
    weight, bias = plain.get("weight"), plain.get("bias")
    if weight is None:
        _require_own_forward(module, "its weight is computed")
    with _unseen():
        if weight is not None and (offset := getattr(module, "weight_offset", 0.0)):
            weight = weight + offset
        precision = _precision(module, x, weight, output)
        try:
            found = _expected(module, x, output, weight, bias)
        except torch.OutOfMemoryError:
            raise
        except MisfitError:
            if parts:
                return None  # a part of an operation need not be the operation on the parts
            raise
        except Exception as error:
            if parts:
                return None
            raise MisfitError(f"{_class_name(module)} cannot take its input: {_first_line(error)}") from error
        if found is None:
            return None
        verdict = Verdict(_figures(found, precision), precision, _class_name(module))
    if parts and not _agrees(verdict):
        return None
    return verdict


def _agrees(verdict: Verdict) -> bool:
    return float(verdict.figures[0]) <= TOLERANCES[verdict.precision]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_split(t: Tensor) -> bool:
    return hasattr(t, "to_local")


def _all_on(t: Tensor, output: Any) -> Tensor:
    """All of a tensor that lies on the mesh of an output."""
    return all_of(t) if getattr(t, "device_mesh", None) == output.device_mesh else t


def _local(t: Tensor) -> Tensor | None:
    """The plain tensor that a tensor stands for, or the part of it that is here; None where there is none."""
    if _is_split(t):
        return cast(Any, t).to_local()
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return None  # without memory of its own, or with a meaning of its own
    return t


def _precision(module: nn.Module, x: Tensor, weight: Tensor | None, output: Tensor) -> str:
    """The precision that a layer worked in: the lowest of its tensors, of autocast and of what products may take."""
    device = x.device.type
    dtypes = [t.dtype for t in (x, weight, output) if t is not None and t.is_floating_point()]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    lowest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    name = str(lowest).removeprefix("torch.")
    if name not in TOLERANCES:
        return "bfloat16"  # 8 bits: whatever deviates from that is told
    return _product_precision(module, device) if name == "float32" else name


def _product_precision(module: nn.Module, device: str) -> str:
    """What float32 products are made of."""
    convolves = isinstance(module, nn.modules.conv._ConvNd)
    if not convolves and not isinstance(module, nn.Linear) and not is_transposed_linear(module):
        return "float32"
    backends: Any = torch.backends
    if device == "cuda":
        backend = backends.cudnn.conv if convolves else backends.cuda.matmul
    else:
        backend = backends.mkldnn.conv if convolves else backends.mkldnn.matmul
    setting = backend.fp32_precision
    if setting == "bf16":
        return "bfloat16"
    # Unless told otherwise cuDNN may take TF32.
    return "tf32" if setting == "tf32" or (device == "cuda" and convolves and setting != "ieee") else "float32"


def _figures(found: Comparison, precision: str) -> Tensor:
    """Largest relative deviation by row and by channel, and whether rows differ."""
    expected, output = found
    first = expected[:1] if len(expected) > 1 else expected[:1, :1]
    if expected.is_cpu and expected.dtype == output.dtype and torch.equal(expected, output):
        return torch.tensor([0.0, float(bool((expected != first).any()))], dtype=torch.float32, device="cpu")
    varies = (expected != first).any()
    dtype = max(expected.dtype, output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    wide = ACCUMULATOR.get(dtype, torch.float32)
    expected, output = expected.to(wide), output.to(wide)
    finite = expected.isfinite()
    # Near the end of the range the one may overflow where the other does not.
    broken = (finite & ~output.isfinite() & (expected.abs() < torch.finfo(dtype).max / 4)).any()
    finite = finite & output.isfinite()
    expected, output = expected.where(finite, 0.0), output.where(finite, 0.0)
    difference = output - expected
    worst = []
    for dim in (0, 1):
        larger = torch.maximum(torch.linalg.vector_norm(expected, dim=dim), torch.linalg.vector_norm(output, dim=dim))
        scale = larger.clamp_min(FLOOR * larger.square().mean().sqrt())
        off = torch.linalg.vector_norm(difference, dim=dim)
        worst.append(torch.where(off > 0, off / scale, 0.0).amax())
    deviation = torch.where(broken, torch.inf, torch.stack(worst).amax())
    return torch.stack((deviation.to(torch.float32), varies.to(torch.float32)))


# What each class computes.


def _expected(module: Any, x: Tensor, output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Comparison | None:
    if x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
        # A layer that casts its weight to its input is what it is.
        weight, bias = (t if t is None else t.to(x.dtype) for t in (weight, bias))
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, x, output, weight, bias)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm(module, x, output, weight, bias)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        spatial = module._get_no_batch_dim() - 1
        x, output = unsqueeze_batch(x, spatial), unsqueeze_batch(output, spatial)
        own = module.training or not module.track_running_stats
        mean, variance = (None, None) if own else (module.running_mean, module.running_var)
        _require(output.shape, x.shape)
        return _of_samples(x, output, lambda x: F.instance_norm(x, mean, variance, weight, bias, own, 0.0, module.eps))
    if isinstance(module, nn.GroupNorm):
        _require(output.shape, x.shape)
        return _of_samples(x, output, lambda x: F.group_norm(x, module.num_groups, weight, bias, module.eps))
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        shape = tuple(module.normalized_shape)
        _require(output.shape, x.shape)
        if tuple(x.shape[x.dim() - len(shape) :]) != shape:
            raise MisfitError(f"its input has shape {tuple(x.shape)}, which does not end in {shape}")

        def normalise(x: Tensor) -> Tensor:
            x = x.unflatten(-1, shape)
            if isinstance(module, nn.RMSNorm):
                scaled = F.rms_norm(x, shape, weight, module.eps)
                return (scaled if bias is None else scaled + bias).flatten(-len(shape))
            return F.layer_norm(x, shape, weight, bias, module.eps).flatten(-len(shape))

        size = math.prod(shape)
        return _of_rows(x.reshape(-1, size), output.reshape(-1, size), normalise)
    if weight is None:
        return None
    if isinstance(module, nn.Embedding):
        return _embedding(x, output, weight)
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        if is_transposed_linear(module):
            weight = weight.t()
        if x.shape[-1] != weight.shape[1]:
            raise MisfitError(f"its input has {x.shape[-1]} features, expected {weight.shape[1]}")
        _require(output.shape, (*x.shape[:-1], weight.shape[0]))
        rows, made = x.reshape(-1, x.shape[-1]), output.reshape(-1, output.shape[-1])
        return _of_rows(rows, made, functools.partial(F.linear, weight=weight, bias=bias))
    return None


def _require_own_forward(module: nn.Module, because: str) -> None:
    """What is known of a bias whose weight is computed: it is what torch's own forward adds.

    Computing the weight again might change something, as an iteration of spectral normalisation does. Nor can the
    output of an Embedding be looked at whose rows processes divide: the mask that adds it up serves once.
    """
    base: Any = class_of_torch(module)
    own: Any = next((c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules")), base)
    for name in ("forward", "_conv_forward"):
        if name in vars(module) or getattr(type(module), name, None) is not getattr(own, name, None):
            raise MisfitError(f"{because}, and its {name}() is not that of {_class_name(module)}")


def _require(found: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(found) != tuple(expected):
        raise MisfitError(f"its output has shape {tuple(found)}, expected {tuple(expected)}")


def _step(count: int, bytes_of_one: int) -> int:
    """Every so many of ``count`` things are looked at, spread so that no period of the batch is met."""
    step = -(-count * bytes_of_one // SAMPLE_BYTES)
    while math.gcd(step, count) > 1 and step < count:
        step += 1
    return max(1, min(step, count))


def _bytes(x: Tensor, output: Tensor, along: int) -> int:
    # The operation done again makes another output.
    total = x.numel() * x.element_size() + 2 * output.numel() * output.element_size()
    return total // max(1, x.shape[along])


def _of_rows(x: Tensor, output: Tensor, operation: Callable[[Tensor], Tensor]) -> Comparison:
    step = _step(len(x), _bytes(x, output, 0))
    return Comparison(operation(x[::step]), output[::step])


def _of_samples(x: Tensor, output: Tensor, operation: Callable[[Tensor], Tensor]) -> Comparison:
    """Whole samples (N, C, positions...); each position is a row."""
    if len(x) != len(output):
        raise MisfitError(f"its output has {len(output)} samples, expected {len(x)}")
    step = _step(len(x), _bytes(x, output, 0))
    expected = operation(x[::step])
    output = output[::step]
    _require(output.shape, expected.shape)
    return Comparison(_positions(expected), _positions(output))


def _positions(x: Tensor) -> Tensor:
    """(N, C, positions...) as (rows, C)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _embedding(tokens: Tensor, output: Tensor, weight: Tensor) -> Comparison:
    if tokens.dtype not in (torch.int64, torch.int32):
        raise MisfitError(f"its input has dtype {tokens.dtype}, expected int64 or int32")
    _require(output.shape, (*tokens.shape, weight.shape[1]))
    # Out of range on a GPU would end the process, where the layer may have taken something else for its tokens.
    tokens = tokens.clamp(0, len(weight) - 1)
    width = weight.shape[1]
    return _of_rows(tokens.reshape(-1, 1), output.reshape(-1, width), lambda x: F.embedding(x.squeeze(-1), weight))


def _batch_norm(module: Any, x: Tensor, output: Tensor, weight: Tensor | None, bias: Tensor | None) -> Comparison:
    """Whole channels."""
    _require(output.shape, x.shape)
    if x.dim() < 2 or weight is None or x.shape[1] != len(weight):
        raise MisfitError(
            f"its input has shape {tuple(x.shape)}, expected {module.num_features} channels in dimension 1"
        )
    step = _step(x.shape[1], _bytes(x, output, 1))
    x, output = x[:, ::step], output[:, ::step]
    own = module.training or module.running_mean is None
    weight, bias = weight[::step], None if bias is None else bias[::step]
    if own and isinstance(module, nn.SyncBatchNorm) and _is_shared(module):
        return _affine(_positions(x), _positions(output), bias)
    mean, variance = (None, None) if own else (module.running_mean[::step], module.running_var[::step])
    expected = F.batch_norm(x, mean, variance, weight, bias, own, 0.0, module.eps)
    return Comparison(_positions(expected), _positions(output))


def _is_shared(module: Any) -> bool:
    if not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size(module.process_group) > 1


def _affine(x: Tensor, output: Tensor, bias: Tensor | None) -> Comparison:
    """The best scale and shift of every channel: mean and variance are those of all processes, which are not asked."""
    wide = ACCUMULATOR.get(output.dtype, torch.float32)
    x, output = x.to(wide), output.to(wide)
    centred, made = x - x.mean(0), output - output.mean(0)
    squares = centred.square().sum(0)
    slope = torch.where(squares > 0, (centred * made).sum(0) / squares, 0.0)
    return Comparison(output.mean(0) + slope * centred, output)


def _convolution(
    module: Any, x: Tensor, output: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Comparison | None:
    if weight is None:
        return None
    spatial = len(module.kernel_size)
    x, output = unsqueeze_batch(x, spatial), unsqueeze_batch(output, spatial)
    if x.dim() != spatial + 2 or output.dim() != spatial + 2:
        raise MisfitError(f"its input has {x.dim()} dimensions and its output {output.dim()}, expected {spatial + 2}")
    rest: Any
    transposes = isinstance(module, nn.modules.conv._ConvTransposeNd)
    module = cast(Any, module)
    if transposes:
        extra = [
            output.shape[2 + d]
            - (x.shape[2 + d] - 1) * module.stride[d]
            + 2 * module.padding[d]
            - module.dilation[d] * (module.kernel_size[d] - 1)
            - 1
            for d in range(spatial)
        ]
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
        rest = module.stride, module.padding, extra, module.groups, module.dilation
        return _of_samples(x, output, lambda x: transposed(x, weight, bias, *rest))
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    if module.padding_mode == "zeros":
        rest = module.stride, module.padding, module.dilation, module.groups
        return _of_samples(x, output, lambda x: convolve(x, weight, bias, *rest))
    rest = module.stride, 0, module.dilation, module.groups
    around, mode = module._reversed_padding_repeated_twice, module.padding_mode
    return _of_samples(x, output, lambda x: convolve(F.pad(x, around, mode=mode), weight, bias, *rest))
