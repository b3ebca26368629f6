"""Fisher-information optimizers for PyTorch, on hand-written kernels."""

from importlib.metadata import PackageNotFoundError, version

from fisher_kernels import backends, ops
from fisher_kernels.backends import use_backend
from fisher_kernels.optim import (
    EKFAC,
    KFAC,
    MBF,
    SOFIM,
    AdaFisher,
    AdaFisherW,
    Costs,
    EKFACAdam,
    LearningRates,
    find_lr,
)

try:
    __version__ = version("fisher_kernels")
except PackageNotFoundError:  # imported from a source folder that was never installed
    __version__ = "0+unknown"

__all__ = [
    "EKFAC",
    "KFAC",
    "MBF",
    "SOFIM",
    "AdaFisher",
    "AdaFisherW",
    "Costs",
    "EKFACAdam",
    "LearningRates",
    "__version__",
    "backends",
    "find_lr",
    "ops",
    "use_backend",
]
