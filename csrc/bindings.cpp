#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "python/capability.h"
#include "python/entry_points.h"
#include "python/tensor.h"

namespace py = pybind11;
namespace fk = fisher_kernels;

namespace {

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

py::object cuda_toolkit() {
#ifdef FISHER_KERNELS_CUDA
  const fk::cuda::Toolkit toolkit = fk::cuda::toolkit();
  return py::make_tuple(toolkit.architectures, toolkit.runtime, toolkit.driver);
#else
  return py::none();
#endif
}

}  // namespace

PYBIND11_MODULE(FISHER_KERNELS_MODULE, module) {
  using namespace pybind11::literals;

  module.doc() = "Kernels of fisher_kernels. Outputs are allocated by the caller. place: a number of threads for tensors on the "
      "CPU, or (index of a CUDA device, address of its stream).";
  fk::load_exchange_api();

  module.def("column_sum_of_squares", &fk::column_sum_of_squares, "x"_a, "out"_a, "place"_a,
             "out[d] = sum over r of x[r, d]^2, for x [..., D], contiguous or a matrix with unit column stride.");
  module.def("channel_sum_of_squares", &fk::channel_sum_of_squares, "x"_a, "out"_a, "place"_a,
             "out[c] = sum over n and s of x[n, c, s]^2, for x [N, C, *S], contiguous or channels last.");
  module.def(
      "patch_sum_of_squares", &fk::patch_sum_of_squares, "x"_a, "out"_a, "kernel_size"_a, "stride"_a, "padding"_a,
      "dilation"_a, "place"_a,
      "out[c, k] = sum over samples and output positions of the square of the zero-padded input that kernel offset k "
      "reads, for x [N, C, *S] with one to three spatial dimensions, each sample contiguous or channels last, and "
      "out [C, *kernel_size]. padding holds (before, after) for each dimension.");
  constexpr const char* kMinMax =
      "out[i] = minmax(x[i] / weights[i]), minmax(v) = (v - min v) / (max v - min v + eps). weights: None for ones, or "
      "one-element tensors; where one is 0, out[i] is ones. The two names differ in what errors call them.";
  module.def("minmax", &fk::minmax, "out"_a, "x"_a, "weights"_a, "eps"_a, "place"_a, kMinMax);
  module.def("minmax_", &fk::minmax_, "out"_a, "x"_a, "weights"_a, "eps"_a, "place"_a, kMinMax);
  module.def("factor_ema_", &fk::factor_ema_, "state"_a, "new"_a, "divisors"_a, "rejected"_a, "decay"_a, "gain"_a,
             "normalize"_a, "eps"_a, "joint"_a, "place"_a,
             "state[i] <- decay * state[i] + gain * (minmax(v) if normalize else v), v = new[i] / divisors[i], followed "
             "by a 1 if new[i] is one entry shorter than state[i]. divisors: None for ones. A run of `joint` vectors "
             "with a non-finite entry in any v stays as it was and is marked 1 in rejected.");
  module.def(
      "adafisher_step_", &fk::adafisher_step_, "params"_a, "grads"_a, "exp_avgs"_a, "steps"_a, "row_factors"_a,
      "column_factors"_a, "lr"_a, "beta"_a, "damping"_a, "weight_decay"_a, "decoupled"_a, "maximize"_a, "grad_scale"_a,
      "found_inf"_a, "skipped"_a, "place"_a,
      "One AdaFisher step of a list of parameters: m <- beta * m + (1 - beta) * g, w <- w - lr * m / (1 - beta^t) / F, "
      "F = row_factor * column_factor + damping. skipped[i] counts the elements whose gradient is not finite, which "
      "stay as they were.");
  module.def("mbf_step_", &fk::mbf_step_, "params"_a, "grads"_a, "momentum_buffers"_a, "inverses"_a, "directions"_a,
             "lr"_a, "momentum"_a, "weight_decay"_a, "decoupled"_a, "maximize"_a, "kl_clip"_a, "grad_scale"_a,
             "found_inf"_a, "skipped"_a, "scale"_a, "place"_a,
             "One mini-block Fisher step of a list of parameters: m <- momentum * m + g, w <- w - lr * scale * P m. "
             "directions[i] is P m, (blocks, rows, size), where inverses[i] is (1, blocks, size, size), else None. "
             "skipped[i] counts the blocks whose P m is not finite, which stay as they were.");
  module.def("sofim_step_", &fk::sofim_step_, "params"_a, "grads"_a, "exp_avgs"_a, "steps"_a, "lr"_a, "beta"_a, "rho"_a,
             "direction"_a, "scope"_a, "weight_decay"_a, "decoupled"_a, "maximize"_a, "grad_scale"_a, "found_inf"_a,
             "skipped"_a, "squares"_a, "place"_a,
             "One SOFIM step of a list of parameters: m <- beta * m + (1 - beta) * g, u = m / (1 - beta^t), "
             "w <- w - lr * (u u^T + rho I)^-1 x, x being u or, with direction 'gradient', g, over all parameters or, "
             "with scope 'tensor', over each. skipped[i] counts the elements whose m would not be finite, which stay "
             "as they were; squares[i] is what parameter i adds to u . u.");
  module.def("block_inverse", &fk::block_inverse, "blocks"_a, "damping"_a, "out"_a, "info"_a, "place"_a,
             "out[b] = (blocks[b] + damping I)^-1 and info[b] = 0, or NaN and 1 where there is no such inverse.");
  module.def("block_inverse_", &fk::block_inverse_, "out"_a, "blocks"_a, "damping"_a, "info"_a, "place"_a,
             "As block_inverse, but out[b] stays as it was where info[b] is 1.");
  module.def("block_solve", &fk::block_solve, "blocks"_a, "damping"_a, "rhs"_a, "out"_a, "info"_a, "place"_a,
             "out[b] = (blocks[b] + damping I)^-1 rhs[b] and info[b] = 0, or NaN and 1 where there is none.");
  module.def("block_apply", &fk::block_apply, "inverse"_a, "vectors"_a, "out"_a, "place"_a,
             "out[b] = inverse[b] vectors[b].");

  module.def("rank_one_solve", &fk::rank_one_solve, "u"_a, "x"_a, "rho"_a, "out"_a, "place"_a,
             "out = (u u^T + rho I)^-1 x, each list of contiguous tensors being one vector.");
  module.def("rank_one_inverse_update_", &fk::rank_one_inverse_update_, "inverse"_a, "u"_a, "decay"_a, "gain"_a,
             "info"_a, "place"_a,
             "inverse[b] <- (decay inverse[b]^-1 + gain u[b] u[b]^T)^-1 and info[b] = 0. Where that would not be "
             "positive definite (1) or finite (2), inverse[b] stays as it was.");
  module.def("low_rank_inverse_update_", &fk::low_rank_inverse_update_, "inverse"_a, "u"_a, "decay"_a, "gain"_a,
             "info"_a, "place"_a,
             "The same with the sum over j of u[b, j] u[b, j]^T in place of u[b] u[b]^T.");

  module.def("weighted_gram_", &fk::weighted_gram_, "out"_a, "x"_a, "weight"_a, "decay"_a, "gain"_a, "place"_a,
             "out <- decay * out + gain * sum over r of weight[r] x[r] x[r]^T, for x [R, D] with unit column stride. "
             "weight: None for ones. Of out the lower triangle is read, and nothing if decay is 0.");
  module.def("mini_block_gram_", &fk::mini_block_gram_, "out"_a, "v"_a, "decay"_a, "gain"_a, "place"_a,
             "out[b] <- decay * out[b] + gain * sum over n of v[n, b] v[n, b]^T, for v [N, B, n], each sample contiguous. "
             "Of out the lower triangles are read, and nothing if decay is 0.");
  module.def(
      "conv_mini_block_gram_", &fk::conv_mini_block_gram_, "out"_a, "x"_a, "grad_output"_a, "kernel_size"_a, "stride"_a,
      "padding"_a, "dilation"_a, "groups"_a, "decay"_a, "gain"_a, "place"_a,
      "out[o, i] <- decay * out[o, i] + gain * sum over samples of w w^T, w being the sample's gradient of kernel "
      "(o, i) of a convolution, for x [N, I, *S] and grad_output [N, O, *L] with one to three spatial dimensions, each "
      "sample contiguous or channels last, and out [O, I / groups, n, n]. padding holds (before, after) for each "
      "dimension. Of out the lower triangles are read, and nothing if decay is 0.");

  module.def("batch_norm_gradients", &fk::batch_norm_gradients, "x"_a, "grad_output"_a, "eps"_a, "mean"_a,
             "variance"_a, "scale"_a, "shift"_a, "place"_a,
             "shift[n, c] = sum over s of grad_output[n, c, s] and scale[n, c] = the same sum of grad_output times "
             "(x - mean[c]) / sqrt(variance[c] + eps), for x and grad_output [N, C, *S], the samples of both contiguous "
             "or those of both channels last. mean, variance: None for those of x over n and s.");

  module.def(
      "stream_update", &fk::stream_update, "firsts"_a, "seconds"_a, "reads"_a, "place"_a,
      "firsts[i] += reads[i], seconds[i] += reads[i] unless None: what the bare memory traffic of a step costs, for benchmarks.");
  module.def(
      "stream_read", &fk::stream_read, "x"_a, "place"_a,
      "Reads x once and returns a sum of its bits: what the bare memory traffic of a sum costs, for benchmarks.");

  module.def("capabilities", &fk::capability_names,
             "Instruction sets of this processor that the kernels are compiled for.");
  module.def(
      "capability", [] { return fk::capability_names()[fk::current_capability()]; }, "The instruction set in use.");
  module.def("set_capability", &fk::set_capability, "name"_a,
             "Chooses the instruction set in use, one of capabilities().");
  module.def("cuda_toolkit", &cuda_toolkit,
             "(architectures, version of the runtime, newest version that the driver knows or 0) of the CUDA kernels "
             "inside, or None without them. Versions are 1000 major + 10 minor.");
  module.def("openmp", &has_openmp, "Whether the kernels use OpenMP threads.");
}
