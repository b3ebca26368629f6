#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

// What bindings.cpp exposes. Each function reads and checks its Python arguments, releases the GIL and runs its kernel.
namespace fisher_kernels {

namespace py = pybind11;

void column_sum_of_squares(py::handle x, py::handle out, int threads);
void channel_sum_of_squares(py::handle x, py::handle out, int threads);
void patch_sum_of_squares(py::handle x, py::handle out, const std::vector<int64_t>& kernel_size,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation, int threads);
void minmax(py::handle out, py::handle x, py::handle weights, double eps);
void minmax_(py::handle out, py::handle x, py::handle weights, double eps);
void factor_ema_(py::handle states, py::handle next, py::handle divisors, py::handle rejected, double decay,
                 double gain, bool normalize, double eps, int64_t joint);
void adafisher_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle row_factors,
                     py::handle column_factors, py::handle lr, double beta, double damping, double weight_decay,
                     bool decoupled, bool maximize, py::handle grad_scale, py::handle found_inf, py::handle skipped,
                     int threads);
void mbf_step_(py::handle params, py::handle grads, py::handle momentum_buffers, py::handle inverses,
               py::handle directions, py::handle lr, double momentum, double weight_decay, bool decoupled,
               bool maximize, py::handle kl_clip, py::handle grad_scale, py::handle found_inf, py::handle skipped,
               py::handle scale, int threads);
void sofim_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle lr, double beta,
                 double rho, const std::string& direction, const std::string& scope,
                 const std::vector<double>& weight_decay, bool decoupled, bool maximize, py::handle grad_scale,
                 py::handle found_inf, py::handle skipped, py::handle squares, int threads);
void block_inverse(py::handle blocks, double damping, py::handle out, py::handle info, int threads);
void block_inverse_(py::handle out, py::handle blocks, double damping, py::handle info, int threads);
void block_solve(py::handle blocks, double damping, py::handle rhs, py::handle out, py::handle info, int threads);
void block_apply(py::handle inverse, py::handle vectors, py::handle out, int threads);
void rank_one_solve(py::handle u, py::handle x, double rho, py::handle out, int threads);
void rank_one_inverse_update_(py::handle inverse, py::handle u, double decay, double gain, py::handle info,
                              int threads);
void low_rank_inverse_update_(py::handle inverse, py::handle u, double decay, double gain, py::handle info,
                              int threads);
void mini_block_gram_(py::handle out, py::handle v, double decay, double gain, int threads);
void conv_mini_block_gram_(py::handle out, py::handle x, py::handle grad_output,
                           const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                           double decay, double gain, int threads);
void weighted_gram_(py::handle out, py::handle x, py::handle weight, double decay, double gain, int threads);
void batch_norm_gradients(py::handle x, py::handle grad_output, double eps, py::handle mean, py::handle variance,
                          py::handle scale, py::handle shift, int threads);

void stream_update(py::handle firsts, py::handle seconds, py::handle reads, int threads);
uint32_t stream_read(py::handle x, int threads);

}  // namespace fisher_kernels
