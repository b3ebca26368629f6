"""Optimizers."""

from fisher_kernels.optim.adafisher import AdaFisher, AdaFisherW
from fisher_kernels.optim.mbf import MBF

__all__ = ["MBF", "AdaFisher", "AdaFisherW"]
