#include <cmath>
#include <string>
#include <vector>

#include "../kernels.h"
#include "blocks.h"
#include "capability.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

/// A tensor of the shape and dtype of its partner.
TensorView read_partner(py::handle object, const TensorView& partner, const Argument& argument) {
  const TensorView tensor = read_tensor(object, argument);
  check_dtype(tensor, partner.dtype, argument);
  if (!same_shape(tensor, partner)) {
    value_error(argument, "has shape " + tensor.shape() + ", expected " + partner.shape());
  }
  check_contiguous(tensor, argument);
  return tensor;
}

/// u is (B, n) where `rank_one`, else (B, k, n).
void update(const Call& call, bool rank_one, py::handle inverse_object, py::handle u_object, double decay,
            double gain, py::handle info_object) {
  const Argument u_argument{call, "u"};
  const TensorView inverse = read_blocks(inverse_object, {call, "inverse"});
  check_not_inference(inverse_object, {call, "inverse"});
  const int64_t count = inverse.sizes[0], n = inverse.sizes[1];
  const TensorView u = read_tensor(u_object, u_argument);
  check_dtype(u, inverse.dtype, u_argument);
  if (u.dims != (rank_one ? 2 : 3) || u.sizes[0] != count || u.sizes[u.dims - 1] != n) {
    value_error(u_argument, "has shape " + u.shape() + ", expected (" + std::to_string(count) +
                                (rank_one ? ", " : ", k, ") + std::to_string(n) + ")");
  }
  const int64_t vectors = rank_one ? 1 : u.sizes[1];
  if (vectors == 0) value_error(u_argument, "has shape " + u.shape() + ", expected at least one vector");
  check_contiguous(u, u_argument);
  check_range(decay, std::isfinite(decay) && decay > 0, "a finite number above 0", {call, "decay"});
  check_range(gain, std::isfinite(gain), "a finite number", {call, "gain"});
  int64_t* const info = read_info(info_object, inverse, {call, "info"});

  const py::gil_scoped_release release;
  run(call, InverseUpdate{inverse.data, u.data, info, decay, gain, count, vectors, n, inverse.dtype, call.place.threads},
      FISHER_KERNELS_VARIANTS(inverse_update_));
}

void rank_one_solve(py::handle u_object, py::handle x_object, double rho, py::handle out_object, const Place& place) {
  const Call call("rank_one_solve", place);
  const List us(u_object, {call, "u"}), xs(x_object, {call, "x"}), outs(out_object, {call, "out"});
  xs.check_size(us.size(), {call, "x"}, "the length of u");
  outs.check_size(us.size(), {call, "out"}, "the length of u");
  check_range(rho, std::isfinite(rho) && rho > 0, "a finite number above 0", {call, "rho"});
  std::vector<RankOneArrays> arrays(us.size());
  for (py::ssize_t i = 0; i < us.size(); ++i) {
    const Argument argument{call, "u", i};
    const TensorView u = read_tensor(us[i], argument);
    check_float(u, argument);
    check_contiguous(u, argument);
    const TensorView x = read_partner(xs[i], u, {call, "x", i});
    const TensorView out = read_partner(outs[i], u, {call, "out", i});
    arrays[i] = {u.data, x.data, out.data, u.numel(), u.dtype};
  }

  const py::gil_scoped_release release;
  run(call, RankOneSolve{arrays.data(), us.size(), rho, call.place.threads}, FISHER_KERNELS_VARIANTS(rank_one_solve));
}

void rank_one_inverse_update_(py::handle inverse, py::handle u, double decay, double gain, py::handle info,
                              const Place& place) {
  update({"rank_one_inverse_update_", place}, true, inverse, u, decay, gain, info);
}

void low_rank_inverse_update_(py::handle inverse, py::handle u, double decay, double gain, py::handle info,
                              const Place& place) {
  update({"low_rank_inverse_update_", place}, false, inverse, u, decay, gain, info);
}

}  // namespace

void bind_rank_one(py::module_& module) {
  module.def("rank_one_solve", &rank_one_solve);
  module.def("rank_one_inverse_update_", &rank_one_inverse_update_);
  module.def("low_rank_inverse_update_", &low_rank_inverse_update_);
}

}  // namespace fisher_kernels
