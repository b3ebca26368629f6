"""Optimizers."""

from fisher_kernels.optim.adafisher import AdaFisher, AdaFisherW
from fisher_kernels.optim.ekfac import EKFAC, EKFACAdam
from fisher_kernels.optim.kfac import KFAC
from fisher_kernels.optim.learning_rate import LearningRates, find_lr
from fisher_kernels.optim.mbf import MBF
from fisher_kernels.optim.measure import Costs
from fisher_kernels.optim.sofim import SOFIM

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
    "find_lr",
]
