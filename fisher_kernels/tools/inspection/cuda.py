"""Every CUDA kernel of the native module, as it was built."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fisher_kernels import backends
from fisher_kernels._library import native_module, native_reason
from fisher_kernels.tools.inspection import machine_code
from fisher_kernels.tools.inspection.rows import MOST_STACK, Row, Streams, TradeOff, stack_faults, width_faults

STREAMING: Mapping[str, Streams] = {
    "adafisher_step.adafisher_step_kernel": Streams(3, 2, "StridedEntry"),
    "batch_norm_gradients.channels_first_kernel": Streams(2, 0),
    "batch_norm_gradients.channels_last_kernel": Streams(2, 0),
    "block_apply.long_rows_kernel": Streams(1, 0),
    "block_apply.short_rows_kernel": Streams(1, 0),
    "block_inverse.kernel": Streams(1, 1),
    "capped_step.descend_kernel": Streams(2, 1, "Strided"),
    "capped_step.heavy_ball_kernel": Streams(2, 1, "Strided"),
    # A momentum in 16 bits is read 8 bytes at a time: the order of the sums is one for all momenta, or for none.
    "capped_step.sums_kernel": Streams(2, 0, "Strided"),
    "factor_ema.ema_ranges_kernel": Streams(1, 0),
    "factor_ema.ema_results_kernel": Streams(2, 1),
    "factor_ema.minmax_kernel": Streams(1, 1),
    "factor_ema.minmax_ranges_kernel": Streams(1, 0),
    "factor_ema.minmax_results_kernel": Streams(1, 1),
    "mbf_step.descend": Streams(2, 1, "Joined"),
    "mbf_step.step_blocks": Streams(1, 0),
    "mbf_step.step_diagonal": Streams(3, 2, "Strided|Joined"),
    "mini_block_gram.small_kernel": Streams(1, 0),
    "rank_one.update_kernel": Streams(1, 1),
    "rank_one_solve.multiply_kernel": Streams(2, 0),
    "rank_one_solve.solve_kernel": Streams(2, 1),
    "sofim_step.advance_kernel": Streams(2, 1, "Strided"),
    "sofim_step.descend_kernel": Streams(2, 1, "Strided"),
    "stochastic_round.kernel": Streams(1, 0),
    "sum_of_squares.sum_columns_kernel": Streams(1, 0),
    "sum_of_squares.sum_pieces_kernel": Streams(1, 0),
}

TRADE_OFFS: Mapping[str, TradeOff] = {}


def why_not() -> str | None:
    """Why nothing can be inspected here, or None."""
    module = native_module()
    if module is None:
        return native_reason()
    if module.cuda_toolkit() is None:
        return "the native module was built without CUDA kernels"
    return backends.why_no_triton()  # whose copy of cuobjdump is used


def names() -> set[str]:
    """Those of all kernels, and of other functions: the module has their symbols beside the packed code."""
    module = native_module()
    assert module is not None
    assert module.__file__ is not None
    symbols = set(re.findall(rb"_Z\w*_GLOBAL__N__\w+", Path(module.__file__).read_bytes()))
    return {name for symbol in symbols if "." in (name := _kernel(symbol.decode()))}


def run(targets: Sequence[str], pattern: str, sample: bool) -> Iterator[Row]:
    """Read the code for those targets that are NVIDIA's."""
    module = native_module()
    assert module is not None
    assert module.__file__ is not None
    built = module.cuda_toolkit()[0].split(",")
    for target in targets:
        family, architecture = target.split(":")
        if family != "cuda":
            continue
        if architecture not in built:
            fault = f"the native module was built for {','.join(built)}: FISHER_KERNELS_CUDA_ARCHS names others"
            yield Row("cuda", target, "every kernel", "", faults=(fault,))
            continue
        seen = set()
        for row in inspect(Path(module.__file__), target):
            if re.search(pattern, row.kernel) and not (sample and row.kernel in seen):
                seen.add(row.kernel)
                yield row


def inspect(file: Path, target: str) -> Iterator[Row]:
    """A row for each kernel for a target in a module, an object or a cubin."""
    found = machine_code.nvidia(file, target.split(":")[1])
    for name, usage in zip(_names(list(found)), found.values(), strict=True):
        kernel, arguments = name
        trade_off = TRADE_OFFS.get(kernel)
        if trade_off is not None and not re.search(trade_off.arguments, arguments):
            trade_off = None
        faults = stack_faults(usage.stack, trade_off)
        yield Row(
            "cuda",
            target,
            kernel,
            arguments,
            usage.registers,
            None,  # shared memory is dynamic
            usage.stack,
            usage.accesses,
            0.0,
            faults + width_faults(STREAMING.get(kernel), target, arguments, usage.accesses),
            trade_off.reason if trade_off and usage.stack > MOST_STACK else None,
        )


def _names(symbols: Sequence[str]) -> list[tuple[str, str]]:
    """File and function of each kernel, and its template arguments where ``c++filt`` is there to read them."""
    tool = shutil.which("c++filt")
    plain: Sequence[str] = symbols
    if tool is not None:
        text = "\n".join(symbols)
        plain = subprocess.run([tool], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(_kernel(symbol), _arguments(name)) for symbol, name in zip(symbols, plain, strict=True)]


def _kernel(symbol: str) -> str:
    """File and function of a symbol, "stem.function": nvcc puts the file into the name of the anonymous namespace."""
    parts = []
    rest = symbol.removeprefix("_ZN")
    while match := re.match(r"\d+", rest):
        start, size = match.end(), int(match[0])
        parts.append(rest[start : start + size])
        rest = rest[start + size :]
    stems = [re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+)_cu_", part) for part in parts]
    stem = next((match[1] for match in stems if match), None)
    return f"{stem}.{parts[-1]}" if stem else ".".join(parts[-2:])


def _arguments(name: str) -> str:
    plain = re.sub(r"(\w+::|\(anonymous namespace\)::)", "", name).removeprefix("void ")
    found = re.match(r"\w+<(.*?)>\(", plain)
    return found[1] if found else ""
