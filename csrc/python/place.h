#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "../common/stream.h"

namespace fisher_kernels {

constexpr int kHost = -1;

/// Where a call runs. In Python: a number of CPU threads, or (index of a CUDA device, address of its stream). A CUDA
/// kernel that was compiled for the host has its tensors there, and kHost for a device.
struct Place {
  int threads = 0;  // 0 for CUDA kernels
  Stream stream{kHost, nullptr};

  bool runs_cuda() const { return threads == 0; }
  bool is_on_gpu() const { return runs_cuda() && stream.device != kHost; }
};

/// A function that was called, for error messages, and where it runs.
struct Call {
  const char* function;
  Place place;

  Call(const char* function_, const Place& place_) : function(function_), place(place_) {}
};

}  // namespace fisher_kernels

namespace pybind11::detail {

template <>
struct type_caster<fisher_kernels::Place> {
  PYBIND11_TYPE_CASTER(fisher_kernels::Place, const_name("int | tuple[int, int]"));

  bool load(handle source, bool) {
    if (PyLong_Check(source.ptr())) {
      value.threads = source.cast<int>();
      if (value.threads < 1) {
        throw value_error("threads is " + std::to_string(value.threads) + ", expected at least 1");
      }
      return true;
    }
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 2) return false;
    const auto [device, stream] = source.cast<std::pair<int, uintptr_t>>();
    value.stream = {device, reinterpret_cast<void*>(stream)};
    return true;
  }
};

}  // namespace pybind11::detail
