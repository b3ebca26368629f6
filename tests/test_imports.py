"""Imports go one way: each module knows only those below it, and kernels know none."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "fisher_kernels"

# From the bottom up; "" is the package itself. Modules on one line do not import one another. Of a folder that has an
# order of its own each module stands here, with the folder's name for its __init__.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_native", "_dispatch_keys", "triton_kernels"),
    ("_library",),
    ("backends",),
    ("ops", "curvature", "curvature.tap"),
    ("curvature.rules", "curvature.broadcast"),
    ("curvature.terms",),
    ("curvature.proof",),
    ("curvature.operations",),
    ("curvature.diagonal_rules", "curvature.block_rules", "curvature.functions"),
    ("curvature.factor_rules",),
    ("curvature.sites",),
    ("curvature.hooks", "curvature.reduction"),
    ("curvature.rounds",),
    ("curvature.statistics", "curvature.rows"),
    ("optim",),
    ("statistics",),
    ("",),
    ("integrations",),
    ("tools", "tools.environment", "tools.samples"),
    ("tools.selftest",),
    ("tools.inspection", "tasks", "terminal"),
    ("runs",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    """The dotted name of a file of the package, as ``fisher_kernels.ops`` for ``fisher_kernels/ops/__init__.py``."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever it does; names out of the package itself in full."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield submodule if submodule.removeprefix(f"{PACKAGE}.") in HEIGHT else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def layer_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to: that of its file in its folder, or of the folder."""
    _, folder, file = [*module.split("."), "", ""][:3]
    return f"{folder}.{file}" if f"{folder}.{file}" in HEIGHT else folder


def faults(source: str, path: Path) -> list[str]:
    """What a file of the package imports against the order."""
    own = layer_of(module_name(path))
    if own not in HEIGHT:
        return [f"{path} has no place in LAYERS"]
    found = []
    for name in imported(source, path):
        other = layer_of(name)
        if name.split(".")[0] != PACKAGE or other == own:
            continue
        if other not in HEIGHT or HEIGHT[other] >= HEIGHT[own]:
            found.append(f"{path} imports {name}")
    return found


def package_files() -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / PACKAGE).rglob("*.py"))]


def test_imports_go_one_way() -> None:
    files = package_files()
    assert len(files) > 10
    assert [fault for path in files for fault in faults((ROOT / path).read_text(), path)] == []


def kernel_faults(source: str, path: Path) -> list[str]:
    """What a file of triton_kernels imports that is neither beside it nor foreign."""
    return [
        f"{path} imports {name}"
        for name in imported(source, PACKAGE / path)
        if name.split(".")[0] in (PACKAGE, "triton_kernels") and layer_of(name) != "triton_kernels"
    ]


def test_kernels_import_nothing_of_the_package() -> None:
    files = sorted((ROOT / "triton_kernels").rglob("*.py"))
    assert files
    assert [fault for path in files for fault in kernel_faults(path.read_text(), path.relative_to(ROOT))] == []
    path = Path("triton_kernels/minmax.py")
    assert kernel_faults("import triton\nfrom . import common\nfrom .common import load", path) == []
    for wrong in ("from fisher_kernels import ops", "from .. import ops", "import triton_kernels.common"):
        assert len(kernel_faults(wrong, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/sum_of_squares.py", "from fisher_kernels.curvature.statistics import Statistics"),
        ("ops/sum_of_squares.py", "import fisher_kernels.optim.adafisher"),
        ("ops/_define.py", "from fisher_kernels import use_backend"),
        ("ops/_define.py", "import fisher_kernels"),
        ("ops/_define.py", "from ..curvature import rules"),
        ("ops/_define.py", "from ..curvature.rules import Rule"),
        ("backends.py", "from fisher_kernels import ops"),
        ("backends.py", "from . import ops"),
        ("_library.py", "def load():\n    from fisher_kernels.backends import reasons"),
        ("curvature/rules.py", "import importlib\nimportlib.import_module('fisher_kernels.curvature.hooks')"),
        ("curvature/tap.py", "from fisher_kernels.curvature import rules"),
        ("curvature/rules.py", "from fisher_kernels.curvature.diagonal_rules import NORMS"),
        ("curvature/block_rules.py", "from .diagonal_rules import Conv"),
        ("curvature/block_rules.py", "if TYPE_CHECKING:\n    from fisher_kernels.optim import AdaFisher"),
        ("curvature/hooks.py", "from fisher_kernels import optim"),
        ("tools/selftest.py", "from . import inspection"),
        ("tools/samples/gram.py", "from fisher_kernels.tools import selftest"),
        ("optim/adafisher.py", "from fisher_kernels.tasks import digits"),
        ("optim/__init__.py", "from ..cli import main"),
        ("ops/__init__.py", "from fisher_kernels.unheard_of import something"),
        ("unheard_of.py", ""),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str) -> None:
    assert len(faults(source, Path(PACKAGE) / path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ops/sum_of_squares.py", "from fisher_kernels.ops._define import define\nfrom fisher_kernels import backends"),
        ("ops/sum_of_squares.py", "from ._define import define\nfrom . import factor_ema\nfrom .. import backends"),
        ("optim/__init__.py", "from .adafisher import AdaFisher\nfrom fisher_kernels.ops import minmax\nimport torch"),
        ("__init__.py", "from . import backends, ops\nfrom fisher_kernels.optim import AdaFisher"),
        ("curvature/hooks.py", "from fisher_kernels.curvature import rules\nfrom .tap import tap"),
        ("tools/inspection/triton.py", "from fisher_kernels.tools import samples\nfrom .rows import Row"),
        ("cli.py", "from fisher_kernels import __version__, tasks\nfrom fisher_kernels.tools import inspection"),
    ],
)
def test_a_right_import_is_allowed(path: str, source: str) -> None:
    assert faults(source, Path(PACKAGE) / path) == []


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("cpu", r"(\.\./)?(common/\w+|kernels|\w+)\.h"),
        ("cuda", r"(common/\w+|kernels|launch)\.h|\w+\.cuh|cuda_(runtime|bf16|fp16)\.h"),
    ],
)
def test_kernels_see_neither_python_nor_torch(folder: str, allowed: str) -> None:
    standard = r"[a-z_]+|immintrin\.h|omp\.h"
    for file in sorted((ROOT / "csrc" / folder).iterdir()):
        for name in re.findall(r'^#include ["<](.*)[">]$', file.read_text(), re.MULTILINE):
            assert re.fullmatch(f"{standard}|{allowed}", name), f"{file.name} includes {name}"


def test_cuda_kernels_neither_wait_nor_allocate() -> None:
    """Nor do they take what costs accuracy; the stand-in for the runtime refuses atomics on floating point."""
    calls = r"cuda\w*Synchronize|cuda(?:Malloc|Free|Memcpy)\w*"
    approximate = r"__(?:exp|exp10|log|log2|log10|sin|cos|tan|pow|fdivide)f\(|\.approx|use_fast_math"
    files = [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc" / "cuda").iterdir())]
    for file in files:
        found = re.findall(f"{calls}|{approximate}", file.read_text())
        assert not found, f"{file.name}: {found}"


WITH_FLOATS = (
    "as_tensor",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "tensor",
    "zeros",
)
WITH_INTEGERS = ("arange", "randint", "randperm", "tril_indices", "triu_indices")


def on_defaults(source: str) -> list[str]:
    """Calls that make a tensor on torch's default device or in its default dtype, which are the user's to set."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name = node.func.attr
        wanted = {"device", "dtype"} if name in WITH_FLOATS else {"device"} if name in WITH_INTEGERS else set()
        if ast.unparse(node.func.value) == "torch" and not wanted <= {keyword.arg for keyword in node.keywords}:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_no_tensor_is_made_on_the_default_device_or_in_the_default_dtype() -> None:
    """In what runs in a user's program; the demo's tasks and the tools are programs of their own."""
    files = [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
    checked = [path for path in files if not {"tasks", "tools"} & set(path.relative_to(ROOT).parts)]
    assert len(checked) > 30
    assert {str(path): calls for path in checked if (calls := on_defaults(path.read_text()))} == {}
    for wrong in (
        "torch.zeros(1)",
        "torch.full((), 1, dtype=torch.float64)",
        "torch.arange(3)",
        "torch.empty(2, device=d)",
    ):
        assert len(on_defaults(wrong)) == 1
    for right in ("torch.zeros(1, dtype=t, device=d)", "torch.arange(3, device=d)", "x.new_zeros(3)", "torch.stack(x)"):
        assert on_defaults(right) == []
