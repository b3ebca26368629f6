"""Prints the compute capabilities of this machine's NVIDIA GPUs, "80;90", as the CUDA driver tells them, without torch.

The driver's own library is there wherever CUDA programs run, in containers too; nvidia-smi need not be.
"""

from __future__ import annotations

import ctypes
import os
import sys

NO_GPU = (34, 100)  # CUDA_ERROR_STUB_LIBRARY, CUDA_ERROR_NO_DEVICE
MAJOR, MINOR = 75, 76  # of CUdevice_attribute


def capabilities() -> set[int]:
    """10 major + minor of every GPU, hidden ones too: others may see them."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return set()
    if error := driver.cuInit(0):
        if error not in NO_GPU:
            print(f", or none that works: cuInit fails with error {error}", file=sys.stderr)
        return set()
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = set()
    for index in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), index)
        parts = []
        for attribute in (MAJOR, MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            parts.append(value.value)
        found.add(10 * parts[0] + parts[1])
    return found


print(*sorted(capabilities()), sep=";")
