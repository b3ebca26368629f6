"""Weights that a function of torch applies, as in ``F.linear(x, layer.weight)``, seen while a model's forward runs.

Attention written by hand, ``nn.MultiheadAttention``, stacked experts and layers that pad, permute or scale around their
own operation apply their weights by functions. In a refresh the forward of the model runs under a mode that sees every
function of torch with a parameter, or a part of one, among its arguments. Each call of a function that is known is the
operation of a layer of torch, which a rule serves; there is nothing to prove, as the function is what it is. A weight
that goes into any other function as well is not served that way, because part of its gradient would be missing.

What a layer does in its own forward is that layer's: it claims the calls that led to its output.
"""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from fisher_kernels.curvature.broadcast import Broadcast
from fisher_kernels.curvature.gathered import is_distributed
from fisher_kernels.curvature.operations import MATRICES, NAMES, flattened, part_of, stack_of

FAR = 64
"""How many nodes of the graph are walked from the output of a layer to a call of a function inside it."""


class Spec(NamedTuple):
    """An operation without its parameters: a key of ``NAMES``, and settings that are plain values."""

    name: str
    settings: dict[str, Any]

    def on(self, weight: Tensor, bias: Tensor | None = None) -> Any:
        """The operation with parameters."""
        biased = {} if bias is None else {"bias": bias}
        return NAMES[self.name][0](weight, **biased, **self.settings)


class _Read(NamedTuple):
    """What a call of a function says: the operation, and the tensors that it is applied to."""

    spec: Spec
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    is_product: bool = False  # a product of matrices, whose weight may be part of a parameter
    extra: Mapping[str, Any] = types.MappingProxyType({})  # settings of this call alone
    ends: Tensor | None = None  # where the rows end that meet each matrix of a stack; by default each has its own


class Call:
    """One call of a function on a parameter, or on rows of it.

    Attributes:
        weight, bias: the parameters; no bias where it is none that is held.
        present: what the model has in the place of the weight, which may have been gathered for this forward.
        spec: the operation on the whole parameter.
        operation: the operation of this call, with the part of the weight that it used.
        start: first row of that part.
        x: the input, without its graph.
        node: of the graph, that made the output.
        hook: on the output.
        by_sample: whether the first dimension of the input may be taken for that of the samples.
        broadcast: what is known of an output of which one row may serve many.
        split: cuts input and output into what meets each matrix of a stack; None where there is one matrix.
        is_turned: whether the weight stands on the left, so that the columns of input and output are the rows.
        added: parameters that another function adds to the output, as a bias.
    """

    def __init__(self, weight: Parameter, bias: Parameter | None, spec: Spec, operation: Any, start: int) -> None:
        self.weight, self.bias, self.spec, self.operation, self.start = weight, bias, spec, operation, start
        self.present: Tensor = weight
        self.x: Tensor | None = None
        self.version = 0
        self.node: Any = None
        self.hook = _GradHook()
        self.by_sample = True
        self.split: Callable[[Tensor], Sequence[Tensor]] | None = None
        self.broadcast: Broadcast | None = None
        self.is_turned = False
        self.added: set[Parameter] = set()

    def pieces(self) -> list[tuple[Any, int, Tensor]]:
        """For each matrix that rows meet the operation, its first row in the parameter, and the input."""
        assert self.x is not None
        if self.split is None or self.is_turned:
            return [(self.operation, self.start, self.x)]
        size = self.present.shape[1]
        matrices = enumerate(zip(self.present.unbind(), self.split(self.x), strict=True))
        return [(self.spec.on(matrix), e * size, x) for e, (matrix, x) in matrices if x.numel()]

    @property
    def is_whole(self) -> bool:
        """Whether the function is applied to all of the parameter."""
        return self.operation.weight.shape == self.weight.shape

    @property
    def whole(self) -> Any:
        """The operation on the whole parameter; a stack of matrices is one matrix of all their rows."""
        if self.is_whole:
            return self.operation
        return self.spec.on(flattened(self.present), self.bias)

    def watch(self, x: Tensor, output: Tensor) -> None:
        """Keep the input, and put a hook on the output: what is written into it later is not the function's doing."""
        self.x, self.node = x.detach(), output.grad_fn
        self.version = 0 if x.is_inference() else x._version
        take_derivative(output, self.hook)

    def unchanged(self) -> bool:
        """Whether the input is as it was."""
        return self.x is not None and (self.x.is_inference() or self.x._version == self.version)


def take_derivative(output: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Let a hook have the derivative by an output that the backward pass goes on with.

    That is what hooks on the tensor make of it, whenever they are put there: clipping it, for example.
    """
    node, number = output.grad_fn, output.output_nr
    if node is None:
        output.register_hook(hook)
        return

    def take(grads: tuple[Tensor | None, ...]) -> None:
        if (grad := grads[number]) is not None:
            hook(grad)

    node.register_prehook(take)


class _GradHook:
    """The hook on the output of a call, which the graph keeps alive; it knows nothing of the graph."""

    use: Callable[[Tensor], None] | None = None
    """What takes the derivative, once it is clear that nobody else does."""

    def __call__(self, grad: Tensor) -> None:
        if self.use is not None:
            self.use(grad)


# What the arguments of each function mean.


def _matrix(args: dict[str, Any], name: str) -> _Read:
    return _Read(Spec(name, {}), args["input"], args["weight"], args.get("bias"), is_product=True)


def _grouped(args: dict[str, Any]) -> _Read | None:
    if not isinstance(args.get("offs"), Tensor) or args.get("bias") is not None:
        return None
    return _Read(Spec("transposed_linear", {}), args["input"], args["weight"], None, True, ends=args["offs"])


def _convolution(args: dict[str, Any], name: str) -> _Read:
    kept = ("stride", "padding", "dilation", "groups", "output_padding")
    settings = {key: args[key] for key in kept if key in args}
    shared = {"groups": settings["groups"]} if "groups" in settings else {}
    return _Read(Spec(name, shared), args["input"], args["weight"], args.get("bias"), extra=settings)


def _norm(args: dict[str, Any], name: str) -> _Read | None:
    if not isinstance(args.get("weight"), Tensor):
        return None
    kept = ("num_groups", "eps") if name == "group_norm" else ("eps",)
    settings = {key: args[key] for key in kept if args.get(key) is not None}
    return _Read(Spec(name, settings), args["input"], args["weight"], args.get("bias"))


def _running_norm(args: dict[str, Any], name: str) -> _Read | None:
    if not isinstance(args.get("weight"), Tensor):
        return None
    own = bool(args.get("training", args.get("use_input_stats", name == "instance_norm")))
    running = {key: args.get(key) for key in ("running_mean", "running_var")}
    settings = {"eps": args.get("eps", 1e-5)}
    if name == "instance_norm":
        settings["spatial"] = args["input"].dim() - 2
    extra = {**settings, "training": own, **({} if own else running)}
    return _Read(Spec(name, settings), args["input"], args["weight"], args.get("bias"), extra=extra)


def _embedding(args: dict[str, Any], name: str) -> _Read | None:
    if args.get("sparse") or args.get("scale_grad_by_freq"):
        return None
    index = args.get("padding_idx")
    settings = {} if index is None or index == -1 else {"padding_idx": index}
    return _Read(Spec(name, settings), args["input"], args["weight"], None)


_Reader = tuple[Sequence[str], Callable[[dict[str, Any]], _Read | None]]

_READERS: dict[Any, _Reader] = {
    F.linear: (("input", "weight", "bias"), partial(_matrix, name="linear")),
    F.embedding: (
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        partial(_embedding, name="embedding"),
    ),
    F.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps"), partial(_norm, name="layer_norm")),
    F.rms_norm: (("input", "normalized_shape", "weight", "eps"), partial(_norm, name="rms_norm")),
    F.group_norm: (("input", "num_groups", "weight", "bias", "eps"), partial(_norm, name="group_norm")),
    F.batch_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        partial(_running_norm, name="batch_norm"),
    ),
    F.instance_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        partial(_running_norm, name="instance_norm"),
    ),
}
_function: Any
for _function in (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__):
    _READERS[_function] = (("input", "weight"), partial(_matrix, name="transposed_linear"))
for _function in (F.conv1d, F.conv2d, F.conv3d):
    _READERS[_function] = (
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        partial(_convolution, name="conv"),
    )
for _function in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    _READERS[_function] = (
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        partial(_convolution, name="conv_transpose"),
    )
if hasattr(torch, "_grouped_mm"):  # what F.grouped_mm is made of
    _READERS[torch._grouped_mm] = (("input", "weight", "offs", "bias", "out_dtype"), _grouped)

# Other names of the arguments by keyword.
_ALIASES = {"other": "weight", "mat2": "weight", "mat_b": "weight", "self": "input", "mat_a": "input"}


class Watch(TorchFunctionMode):
    """Sees the functions that are applied to parameters in one forward, in one thread.

    Args:
        wanted: the parameters to look for.
        engine: is asked for what may broadcast the output of an Embedding.

    Attributes:
        calls: of functions that are known, in order.
        others: parameter -> the function that is not known that it went into.
        strays: the same as (parameter, function, node), less what layers did in their forwards.
        claimed: the parameters of these layers.
    """

    def __init__(self, wanted: Collection[Parameter], engine: Engine) -> None:
        self.wanted, self.engine = wanted, engine
        self._divided = any(map(is_distributed, wanted))
        self._held: dict[Tensor, Parameter] = {}  # what was gathered in the place of parameters -> these
        self.calls: list[Call] = []
        self.others: dict[Parameter, str] = {}
        self.strays: list[tuple[Parameter, str, Any]] = []
        self.claimed: set[Parameter] = set()
        self.depth = 1
        self.inside = 0  # nn.MultiheadAttention, where the second dimension is that of the samples

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_compiling() or not self.depth:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Made of other functions, which are seen if it runs as if there were no mode.
            self.inside += 1
            try:
                with self:
                    return _body(func)(*args, **kwargs)
            finally:
                self.inside -= 1
        output = func(*args, **kwargs)
        touched: dict[Parameter, None] = {}
        try:
            touched = {p: None for t in _tensors((*args, *kwargs.values())) if (p := self._parameter(t)) is not None}
            if touched:
                self._note(func, args, kwargs, output, touched)
        except Exception as error:  # the forward goes on
            self.others.update(dict.fromkeys(map(self.held, touched), f"{getattr(func, '__name__', func)} ({error})"))
        return output

    def _parameter(self, t: Tensor) -> Parameter | None:
        """The parameter that a tensor is or that it is a part of, as the model has it now."""
        if self._is_wanted(t):
            return t  # type: ignore[return-value]
        base = t._base
        return base if base is not None and self._is_wanted(base) else None  # type: ignore[return-value]

    def _is_wanted(self, t: Tensor) -> bool:
        """Whether a tensor is a parameter that is looked for, or was gathered in its place."""
        if t in self.wanted or t in self._held:
            return True
        if not self._divided or not isinstance(t, Parameter):
            return False
        p = self.engine.held_as(t)  # asked again each time: functions also gather it, before it is in its place
        if p is None or p not in self.wanted:
            return False
        self._held[t] = p
        return True

    def held(self, present: Any) -> Any:
        """The parameter in the place of which the model has this."""
        return self._held.get(present, present)

    def _note(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any, touched: dict[Parameter, None]
    ) -> None:
        known = func in _READERS
        if not known and not _leaves(output, touched):
            return
        name = getattr(func, "__name__", str(func))
        if known and not torch.is_grad_enabled():
            # Activation checkpointing of the reentrant kind does the forward again during the backward.
            self.others.update(dict.fromkeys(map(self.held, touched), f"{name} without gradients"))
            return
        call = self._read(func, args, kwargs) if known else None
        x = None if call is None else call[1]
        if call is not None and call[0].spec.name in MATRICES and _is_weights(x):
            call, name = None, f"{name} of two parameters"
        if call is not None and isinstance(x, Tensor) and isinstance(output, Tensor) and output.grad_fn is not None:
            call[0].watch(x, output)
            call[0].by_sample = not self.inside
            if call[0].spec.name == "embedding":
                call[0].broadcast = self.engine.expect(x, output)
            self.calls.append(call[0])
            for p in (call[0].weight, call[0].bias):
                touched.pop(p, None)  # type: ignore[arg-type]
            if self._parameter(x) is call[0].weight:
                touched[call[0].weight] = None
            call[0].weight, call[0].bias = self.held(call[0].weight), self.held(call[0].bias)
        node = next((t.grad_fn for t in _tensors((output,)) if t.grad_fn is not None), None)
        for present in touched:
            p = self.held(present)
            self.others.setdefault(p, name)
            added = not known and any(t is present for t in args) and self._note_addition(p, node)
            if node is not None and not added:
                self.strays.append((p, name, node))

    def _note_addition(self, p: Parameter, node: Any) -> bool:
        """Note with a product that a parameter is added to what it made, row by row; whether there is one."""
        if node is None or node.name() != "AddBackward0" or getattr(node, "_saved_alpha", 1) != 1 or p.dim() != 1:
            return False
        terms = [term for term, _ in node.next_functions]
        biased = [c for c in self.calls if c.spec.name in MATRICES and any(term is c.node for term in terms)]
        for call in biased:
            call.added.add(p)
        return bool(biased)

    def _read(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Call, Any] | None:
        names, reader = _READERS[func]
        named = {_ALIASES.get(key, key): value for key, value in kwargs.items()}
        read = reader({**dict(zip(names, args, strict=False)), **named})
        if read is None or not isinstance(read.weight, Tensor):
            return None
        weight = self._parameter(read.weight)
        if weight is None and read.is_product and min(read.x.dim(), read.weight.dim()) > 1:
            return self._read_left(read)
        if weight is None:
            return None
        bias = read.bias if isinstance(read.bias, Tensor) else None
        if not read.is_product:
            if read.weight is not weight:
                return None
            held = bias if bias is not None and self._is_wanted(bias) else None
            operation = NAMES[read.spec.name][0](
                weight, **({} if bias is None else {"bias": bias}), **{**read.spec.settings, **read.extra}
            )
            return Call(weight, held, read.spec, operation, 0), read.x  # type: ignore[arg-type]
        if read.weight.dim() == 3:
            return self._read_stack(read, weight)
        found = part_of(weight, read.weight)
        if found is None:
            return None
        start, transposed = found
        by_input = (read.spec.name == "transposed_linear") != transposed
        spec = Spec("transposed_linear" if by_input else "linear", {})
        part = read.weight.t() if transposed and read.weight is not weight else read.weight
        whole_bias = self._bias(bias, weight, start, part, by_input)
        operation = spec.on(part, bias if whole_bias is not None else None)
        return Call(weight, whole_bias, spec, operation, start), read.x

    def _read_left(self, read: _Read) -> tuple[Call, Any] | None:
        """A product with the parameter on the left: transposed it is on the right, of the columns."""
        weight = self._parameter(read.x)
        found = None if weight is None or read.x.dim() != 2 else part_of(weight, read.x)
        if found is None or weight is None or read.bias is not None:
            return None
        start, transposed = found
        part = read.x.t() if transposed else read.x
        spec = Spec("transposed_linear" if transposed else "linear", {})
        call = Call(weight, None, spec, spec.on(part), start)
        call.is_turned, call.split = True, _turned
        return call, read.weight.mT

    def _read_stack(self, read: _Read, weight: Parameter) -> tuple[Call, Any] | None:
        transposed = None if read.bias is not None else stack_of(weight, read.weight)
        rows_apart = read.ends is not None and read.x.dim() == 2
        if transposed is None or not (rows_apart or (read.ends is None and read.x.shape[:-2] == weight.shape[:1])):
            return None
        spec = Spec("linear" if transposed else "transposed_linear", {})
        call = Call(weight, None, spec, spec.on(flattened(weight)), 0)
        call.split = partial(_segments, read.ends) if read.ends is not None else Tensor.unbind
        return call, read.x

    def _bias(
        self, bias: Tensor | None, weight: Parameter, start: int, part: Tensor, by_input: bool
    ) -> Parameter | None:
        """The parameter that a bias is, or the same part of as the weight is of its own."""
        held = None if bias is None or weight.dim() != 2 else self._parameter(bias)
        if held is None or bias is held or bias is None:
            return held
        matches = held.dim() == 1 and len(held) == len(weight) and not by_input and bias.is_contiguous()
        same = bias.shape == part.shape[:1] and bias.storage_offset() - held.storage_offset() == start
        return held if matches and same else None

    def claim(
        self, weights: Iterable[Parameter], inputs: Iterable[Any], output: Tensor, whatever_follows: bool
    ) -> bool | None:
        """Leave to a layer the calls that led from its inputs to its output.

        Returns whether there are any; None, and they are left, where something comes after one of them that may change
        the derivative, also where it changes no number, unless that is of no account.
        """
        weights = list(weights)
        stops = [t.grad_fn for t in inputs if isinstance(t, Tensor) and t.grad_fn is not None]
        mine = [call for call in self.calls if any(call.weight is p for p in weights)]
        mine = [call for call in mine if _reaches(output.grad_fn, call.node, stops)]
        if not whatever_follows and not all(_reaches(output.grad_fn, call.node, stops, _passes_on) for call in mine):
            return None
        self.claimed.update(weights)
        for call in mine:
            self.calls.remove(call)
        self.strays = [
            (weight, name, node)
            for weight, name, node in self.strays
            if all(weight is not p for p in weights) or not _reaches(output.grad_fn, node, stops)
        ]
        return bool(mine)


def _turned(x: Tensor) -> list[Tensor]:
    return [x.mT]


def _segments(ends: Tensor, x: Tensor) -> list[Tensor]:
    """Rows up to each of several ends; reading these waits for a GPU."""
    bounds = [0, *ends.tolist()]
    return [x[begin:end] for begin, end in itertools.pairwise(bounds)]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (t for t in value if isinstance(t, Tensor))


def _is_weights(x: Any) -> bool:
    """Whether a matrix is a parameter, or one transposed: a product with it makes weights, and its rows are no samples.

    Learned queries that are expanded to a batch have three dimensions.
    """
    return isinstance(x, Tensor) and x.dim() == 2 and (isinstance(x, Parameter) or isinstance(x._base, Parameter))


def _leaves(output: Any, parameters: Collection[Parameter]) -> bool:
    """Whether a result carries a gradient to one of these parameters and is not a part of it."""
    for t in _tensors(output if isinstance(output, list | tuple) else (output,)):
        if t.requires_grad and t not in parameters and (t._base is None or t._base not in parameters):
            return True
    return False


_PASSING = ("Add", "View", "UnsafeView", "ReshapeAlias", "ToCopy", "T", "Transpose", "Permute", "Clone", "Alias")
"""Nodes of the graph that hand the derivative on as it is, in another layout or precision at most."""


def _passes_on(node: Any) -> bool:
    return node.name().partition("Backward")[0] in _PASSING and getattr(node, "_saved_alpha", 1) == 1


def _reaches(start: Any, node: Any, stops: Sequence[Any], through: Callable[[Any], bool] = bool) -> bool:
    """Whether a node of the graph is met on the way back from another, before any of the stops.

    Args:
        through: whether the way may lead through a node; by default through each.
    """
    seen, nodes = set(stops), [start]
    for _ in range(FAR):
        if not nodes:
            return False
        current = nodes.pop(0)
        if current is node:
            return True
        if current is None or current in seen or not through(current):
            continue
        seen.add(current)
        nodes += [edge for edge, _ in current.next_functions]
    return False


def _body(function: Any) -> Any:
    """A function of torch that does not ask whether a mode is there."""
    without = {**function.__globals__, "has_torch_function": lambda args: False}
    made = types.FunctionType(function.__code__, without, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Engine(Protocol):
    """Whoever looks for functions."""

    def wanted(self) -> Collection[Parameter]:
        """Which parameters to look for in a forward that begins; none to look for nothing."""

    def held_as(self, present: Tensor) -> Parameter | None:
        """The parameter in the place of which the model has what was gathered for this forward."""

    def expect(self, x: Tensor, output: Tensor) -> Broadcast | None:
        """Look for what broadcasts the output of an Embedding."""

    def receive(self, watch: Watch) -> None:
        """Take what was seen in a forward that has passed."""


class Watches:
    """The watches of one model's forwards, one in each thread.

    Args:
        engine: says which parameters are looked for, and takes a watch once its forward has passed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._active: dict[int, Watch] = {}

    def current(self) -> Watch | None:
        """The watch of the forward that runs in this thread."""
        return self._active.get(threading.get_ident()) if self._active else None

    def begin(self, counts: bool) -> None:
        """A forward begins, the backward of which may count."""
        if (watch := self.current()) is not None:
            watch.depth += 1  # the model calls itself
        elif counts and (wanted := self._engine.wanted()):
            watch = self._active[threading.get_ident()] = Watch(wanted, self._engine)
            watch.__enter__()

    def end(self) -> None:
        """It ends, if only by an error."""
        watch = self.current()
        if watch is not None:
            watch.depth -= 1
            if not watch.depth:
                self.abandon()
                self._engine.receive(watch)

    def abandon(self) -> None:
        """Look no more in this thread: a forward that was interrupted never ends."""
        watch = self._active.pop(threading.get_ident(), None)
        if watch is not None:
            watch.depth = 0
            # That of another optimizer of the model may lie upon it, and has to end first.
            while isinstance(top := _get_current_function_mode(), Watch) and not top.depth:
                top.__exit__(None, None, None)
