"""A checkout that nobody has installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import fisher_kernels

ROOT = Path(__file__).resolve().parents[1]
NESTED = "fisher_kernels.triton_kernels"


def nest_triton_kernels(root: Path = ROOT) -> None:
    """Make ``fisher_kernels.triton_kernels`` importable, which lies beside the package until that is installed."""
    if importlib.util.find_spec(NESTED) is not None:
        return
    folder = root / "triton_kernels"
    spec = importlib.util.spec_from_file_location(
        NESTED, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NESTED] = module
    spec.loader.exec_module(module)
    setattr(fisher_kernels, "triton_kernels", module)  # noqa: B010  (as an import does)


def load_script(path: str) -> ModuleType:
    """A Python file of the checkout that belongs to no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
