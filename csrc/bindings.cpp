#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/tensor.h"

namespace fisher_kernels {

// Each in the file of its name in python/.
void bind_adafisher_step(py::module_& module);
void bind_batch_norm_gradients(py::module_& module);
void bind_block_inverse(py::module_& module);
void bind_capability(py::module_& module);
void bind_capped_step(py::module_& module);
void bind_conv_gram(py::module_& module);
void bind_factor_ema(py::module_& module);
void bind_gram(py::module_& module);
void bind_limits(py::module_& module);
void bind_mbf_step(py::module_& module);
void bind_mini_block_gram(py::module_& module);
void bind_rank_one(py::module_& module);
void bind_sofim_step(py::module_& module);
void bind_stochastic_round(py::module_& module);
void bind_sum_of_squares(py::module_& module);
void bind_tensor_cores(py::module_& module);

}  // namespace fisher_kernels

PYBIND11_MODULE(FISHER_KERNELS_MODULE, module) {
  using namespace fisher_kernels;

  module.doc() = "Kernels of fisher_kernels. Arguments go by position, outputs are allocated by the caller. The last "
      "argument is the place: a number of threads for tensors on the CPU, or (index of a CUDA device, address of its "
      "stream).";
  module.def("load_exchange_api", &load_exchange_api);
  module.def("set_key_bits", &set_key_bits);
  module.def("tensor_flags", &tensor_flags);
  py::register_local_exception<Unresolved>(module, "UnresolvedError", PyExc_ValueError);

  bind_adafisher_step(module);
  bind_batch_norm_gradients(module);
  bind_block_inverse(module);
  bind_capability(module);
  bind_capped_step(module);
  bind_conv_gram(module);
  bind_factor_ema(module);
  bind_gram(module);
  bind_limits(module);
  bind_mbf_step(module);
  bind_mini_block_gram(module);
  bind_rank_one(module);
  bind_sofim_step(module);
  bind_stochastic_round(module);
  bind_sum_of_squares(module);
  bind_tensor_cores(module);
}
