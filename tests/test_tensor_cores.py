"""Tensor cores: the probe of what kernels take them to do."""

from __future__ import annotations

from bench.gpu.probe import WRAPPERS, wrong_numbers


def test_the_wrappers_do_what_they_say(cuda_backend: str) -> None:
    assert wrong_numbers() == dict.fromkeys(WRAPPERS, 0)
