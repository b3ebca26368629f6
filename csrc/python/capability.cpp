#include "capability.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "../common/processor.h"

namespace fisher_kernels {

namespace py = pybind11;

namespace {

bool is_for_processor_of_build() {
#ifdef FISHER_KERNELS_CPU_NATIVE
  return true;
#else
  return false;
#endif
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
  const cuda::Toolkit toolkit = cuda::toolkit();
  if (toolkit.why_missing != nullptr) return py::none();
  return py::make_tuple(toolkit.architectures, toolkit.runtime, toolkit.driver);
}

py::object why_no_cuda() {
  const cuda::Toolkit toolkit = cuda::toolkit();
  return toolkit.why_missing == nullptr ? py::object(py::none()) : py::str(toolkit.why_missing);
}

}  // namespace

std::vector<std::string> capability_names() {
  static const std::vector<std::string> names =
      usable_capabilities(built_capabilities(), processor_capabilities());
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
  module.def("built_capabilities", &built_capabilities);
  module.def("processor_capabilities", &processor_capabilities);
  module.def("is_for_processor_of_build", &is_for_processor_of_build);
  module.def("cuda_toolkit", &cuda_toolkit);
  module.def("why_no_cuda", &why_no_cuda);
  module.def("openmp", &has_openmp);
}

}  // namespace fisher_kernels
