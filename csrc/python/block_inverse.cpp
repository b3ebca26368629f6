#include <cmath>

#include "../kernels.h"
#include "blocks.h"
#include "capability.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void check_damping(double damping, const Argument& argument) {
  if (std::isfinite(damping) && damping >= 0) return;
  value_error(argument, "is " + std::string(py::str(py::float_(damping))) + ", expected a finite number of at least 0");
}

void invert(const Call& call, py::handle blocks_object, double damping, py::handle out_object,
            py::handle info_object, bool keep_bad) {
  const TensorView blocks = read_blocks(blocks_object, {call, "blocks"});
  check_damping(damping, {call, "damping"});
  const int64_t count = blocks.sizes[0], n = blocks.sizes[1];
  const TensorView out = read_like(out_object, blocks, {count, n, n}, {call, "out"});
  check_not_inference(out_object, {call, "out"});
  int64_t* const info = read_info(info_object, blocks, {call, "info"});

  const py::gil_scoped_release release;
  run(call, BlockInverse{blocks.data, out.data, info, damping, count, n, blocks.dtype, keep_bad, call.place.threads},
      FISHER_KERNELS_VARIANTS(block_inverse));
}

void block_inverse(py::handle blocks, double damping, py::handle out, py::handle info, const Place& place) {
  invert({"block_inverse", place}, blocks, damping, out, info, false);
}

void block_inverse_(py::handle out, py::handle blocks, double damping, py::handle info, const Place& place) {
  invert({"block_inverse_", place}, blocks, damping, out, info, true);
}

void block_solve(py::handle blocks_object, double damping, py::handle rhs_object, py::handle out_object,
                 py::handle info_object, const Place& place) {
  const Call call("block_solve", place);
  const TensorView blocks = read_blocks(blocks_object, {call, "blocks"});
  check_damping(damping, {call, "damping"});
  const int64_t count = blocks.sizes[0], n = blocks.sizes[1];
  const TensorView rhs = read_like(rhs_object, blocks, {count, n}, {call, "rhs"});
  const TensorView out = read_like(out_object, blocks, {count, n}, {call, "out"});
  int64_t* const info = read_info(info_object, blocks, {call, "info"});

  const py::gil_scoped_release release;
  run(call, BlockSolve{blocks.data, rhs.data, out.data, info, damping, count, n, blocks.dtype, call.place.threads},
      FISHER_KERNELS_VARIANTS(block_solve));
}

void block_apply(py::handle inverse_object, py::handle vectors_object, py::handle out_object, const Place& place) {
  const Call call("block_apply", place);
  const TensorView inverse = read_blocks(inverse_object, {call, "inverse"});
  const int64_t count = inverse.sizes[0], n = inverse.sizes[1];
  const TensorView vectors = read_like(vectors_object, inverse, {count, n}, {call, "vectors"});
  const TensorView out = read_like(out_object, inverse, {count, n}, {call, "out"});

  const py::gil_scoped_release release;
  run(call, BlockApply{inverse.data, vectors.data, out.data, count, n, inverse.dtype, call.place.threads},
      FISHER_KERNELS_VARIANTS(block_apply));
}

}  // namespace

void bind_block_inverse(py::module_& module) {
  module.def("block_inverse", &block_inverse);
  module.def("block_inverse_", &block_inverse_);
  module.def("block_solve", &block_solve);
  module.def("block_apply", &block_apply);
}

}  // namespace fisher_kernels
