"""Optimizers."""

from fisher_kernels.optim.adafisher import AdaFisher, AdaFisherW
from fisher_kernels.optim.mbf import MBF
from fisher_kernels.optim.sofim import SOFIM

__all__ = ["MBF", "SOFIM", "AdaFisher", "AdaFisherW"]
