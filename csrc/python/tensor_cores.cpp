#include "../kernels.h"
#include "capability.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void probe_tensor_cores(py::handle wrong_object, const Place& place) {
  const Call call("probe_tensor_cores", place);
  const Argument argument{call, "wrong"};
  const TensorView wrong = read_written(wrong_object, argument);
  check_dtype(wrong, DType::int64, argument);
  check_shape(wrong, {cuda::TensorCoreProbe::kProbes}, argument);
  check_contiguous(wrong, argument);
  if (!place.runs_cuda()) value_error({call, "place"}, "is a number of threads, expected a CUDA device");
  const py::gil_scoped_release release;
  cuda::probe_tensor_cores({static_cast<int64_t*>(wrong.data)}, place.stream);
}

}  // namespace

void bind_tensor_cores(py::module_& module) {
  module.def("probe_tensor_cores", &probe_tensor_cores);
}

}  // namespace fisher_kernels
