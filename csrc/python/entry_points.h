#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "place.h"

// What bindings.cpp exposes. Each function reads and checks its Python arguments, releases the GIL and runs its kernel.
namespace fisher_kernels {

namespace py = pybind11;

void column_sum_of_squares(py::handle x, py::handle out, const Place& place);
void channel_sum_of_squares(py::handle x, py::handle out, const Place& place);
void patch_sum_of_squares(py::handle x, py::handle out, const std::vector<int64_t>& kernel_size,
                          const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                          const std::vector<int64_t>& dilation, const Place& place);
void minmax(py::handle out, py::handle x, py::handle weights, double eps, const Place& place);
void minmax_(py::handle out, py::handle x, py::handle weights, double eps, const Place& place);
void factor_ema_(py::handle states, py::handle next, py::handle divisors, py::handle rejected, double decay,
                 double gain, bool normalize, double eps, int64_t joint, const Place& place);
void adafisher_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle row_factors,
                     py::handle column_factors, py::handle lr, double beta, double damping, double weight_decay,
                     bool decoupled, bool maximize, py::handle grad_scale, py::handle found_inf, py::handle skipped,
                     const Place& place);
void mbf_step_(py::handle params, py::handle grads, py::handle momentum_buffers, py::handle inverses,
               py::handle directions, py::handle lr, double momentum, double weight_decay, bool decoupled,
               bool maximize, py::handle kl_clip, py::handle grad_scale, py::handle found_inf, py::handle skipped,
               py::handle scale, const Place& place);
void sofim_step_(py::handle params, py::handle grads, py::handle exp_avgs, py::handle steps, py::handle lr, double beta,
                 double rho, const std::string& direction, const std::string& scope,
                 const std::vector<double>& weight_decay, bool decoupled, bool maximize, py::handle grad_scale,
                 py::handle found_inf, py::handle skipped, py::handle squares, const Place& place);
void block_inverse(py::handle blocks, double damping, py::handle out, py::handle info, const Place& place);
void block_inverse_(py::handle out, py::handle blocks, double damping, py::handle info, const Place& place);
void block_solve(py::handle blocks, double damping, py::handle rhs, py::handle out, py::handle info, const Place& place);
void block_apply(py::handle inverse, py::handle vectors, py::handle out, const Place& place);
void rank_one_solve(py::handle u, py::handle x, double rho, py::handle out, const Place& place);
void rank_one_inverse_update_(py::handle inverse, py::handle u, double decay, double gain, py::handle info,
                              const Place& place);
void low_rank_inverse_update_(py::handle inverse, py::handle u, double decay, double gain, py::handle info,
                              const Place& place);
void mini_block_gram_(py::handle out, py::handle v, double decay, double gain, const Place& place);
void conv_mini_block_gram_(py::handle out, py::handle x, py::handle grad_output,
                           const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                           const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups,
                           double decay, double gain, const Place& place);
void weighted_gram_(py::handle out, py::handle x, py::handle weight, double decay, double gain, const Place& place);
void batch_norm_gradients(py::handle x, py::handle grad_output, double eps, py::handle mean, py::handle variance,
                          py::handle scale, py::handle shift, const Place& place);

void stream_update(py::handle firsts, py::handle seconds, py::handle reads, const Place& place);
uint32_t stream_read(py::handle x, const Place& place);

}  // namespace fisher_kernels
