"""Optimizers."""

from fisher_kernels.optim.adafisher import AdaFisher, AdaFisherW

__all__ = ["AdaFisher", "AdaFisherW"]
