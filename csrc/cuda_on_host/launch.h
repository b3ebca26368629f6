#pragma once

// Launches of kernels, in place of <<<grid, block, shared_bytes, stream>>>.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fisher_kernels::on_host {

/// A kernel with its arguments, and the grid it is to run on.
struct Launch {
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
  size_t parameter_bytes;
  void (*call)(const void* context);  // what one CUDA thread does
  const void* context;
};

/// Runs the whole grid, or returns why it does not or why it stopped; `last_message` then says more.
cudaError_t run(const Launch& launch);

/// What the last launch from this thread of the processor had to complain of; empty if nothing.
const std::string& last_message();

/// Bytes of parameters laid one after the other, each at its alignment.
template <class... Params>
constexpr size_t parameter_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Params) - 1) / alignof(Params) * alignof(Params) + sizeof(Params)), ...);
  return bytes;
}

/// Runs `kernel` on a grid. Every CUDA thread gets its own copy of the parameters, as on the device.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "a kernel takes as many arguments as it has parameters");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "parameters travel to the device as bytes");
  using Call = std::pair<void (*)(Params...), std::tuple<Params...>>;
  const Call call{kernel, std::tuple<Params...>(std::forward<Args>(args)...)};
  return run({reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, parameter_bytes<Params...>(),
              [](const void* context) {
                const Call& self = *static_cast<const Call*>(context);
                std::apply(self.first, self.second);
              },
              &call});
}

}  // namespace fisher_kernels::on_host
