"""Calls of every op, one module for each stem: inputs, and the error that rounding explains.

The self-test runs them, the inspection of GPU code compiles what they launch, the tests of what all ops share are made
of them; tests and benchmarks of an op take what builds its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from fisher_kernels.tools.samples import (
    adafisher_step,
    batch_norm_gradients,
    block_inverse,
    capped_step,
    conv_gram,
    factor_ema,
    gram,
    mbf_step,
    mini_block_gram,
    rank_one,
    sofim_step,
    stochastic_round,
    sum_of_squares,
)
from fisher_kernels.tools.samples.sample import Inputs, Sample, Source, Tolerance, random

__all__ = ["SAMPLES", "Inputs", "Sample", "Source", "Tolerance", "random"]

_STEMS = (
    sum_of_squares,
    factor_ema,
    block_inverse,
    rank_one,
    mini_block_gram,
    batch_norm_gradients,
    gram,
    conv_gram,
    adafisher_step,
    mbf_step,
    sofim_step,
    capped_step,
    stochastic_round,
)

SAMPLES: Sequence[Sample] = tuple(sample for stem in _STEMS for sample in stem.SAMPLES)
