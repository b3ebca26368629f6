#include "capability.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace fisher_kernels {

namespace py = pybind11;

namespace {

std::vector<std::string> detect() {
  std::vector<std::string> names{"baseline"};
#ifdef FISHER_KERNELS_X86
  // These ask the operating system too whether it saves the wide registers. (f16c, which older compilers do not know
  // here, is older than avx2.)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) names.push_back("avx2");
  if (avx2 && avx512) names.push_back("avx512");
#endif
  return names;
}

std::atomic<int>& chosen() {
  static std::atomic<int> position{static_cast<int>(capability_names().size()) - 1};
  return position;
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

py::object cuda_toolkit() {
#ifdef FISHER_KERNELS_CUDA
  const cuda::Toolkit toolkit = cuda::toolkit();
  return py::make_tuple(toolkit.architectures, toolkit.runtime, toolkit.driver);
#else
  return py::none();
#endif
}

}  // namespace

std::vector<std::string> capability_names() {
  static const std::vector<std::string> names = detect();
  return names;
}

void refuse_cuda(const char* function) {
  throw std::runtime_error(std::string(function) + ": this module has no CUDA kernel of that name");
}

int current_capability() { return chosen().load(std::memory_order_relaxed); }

void set_capability(const std::string& name) {
  const std::vector<std::string> names = capability_names();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    std::string known;
    for (const std::string& each : names) known += (known.empty() ? "" : ", ") + each;
    throw py::value_error("set_capability: name is '" + name + "', expected one of: " + known);
  }
  chosen().store(static_cast<int>(found - names.begin()));
}

void bind_capability(py::module_& module) {
  module.def("capabilities", &capability_names);
  module.def("capability", [] { return capability_names()[current_capability()]; });
  module.def("set_capability", &set_capability);
  module.def("cuda_toolkit", &cuda_toolkit);
  module.def("openmp", &has_openmp);
}

}  // namespace fisher_kernels
