#include <cmath>

#include "../kernels.h"
#include "blocks.h"
#include "capability.h"
#include "entry_points.h"
#include "tensor.h"

namespace fisher_kernels {

namespace {

void check_damping(double damping, const Argument& argument) {
  if (std::isfinite(damping) && damping >= 0) return;
  value_error(argument, "is " + std::string(py::str(py::float_(damping))) + ", expected a finite number of at least 0");
}

void invert(const char* function, py::handle blocks_object, double damping, py::handle out_object,
            py::handle info_object, bool keep_bad, int threads) {
  const TensorView blocks = read_blocks(blocks_object, {function, "blocks"});
  check_damping(damping, {function, "damping"});
  const int64_t count = blocks.sizes[0], n = blocks.sizes[1];
  const TensorView out = read_like(out_object, blocks, {count, n, n}, {function, "out"});
  int64_t* const info = read_info(info_object, blocks, {function, "info"});
  check_threads(threads, {function, "threads"});

  const py::gil_scoped_release release;
  run(BlockInverse{blocks.data, out.data, info, damping, count, n, blocks.dtype, keep_bad, threads},
      {FISHER_KERNELS_VARIANTS(block_inverse)});
}

}  // namespace

void block_inverse(py::handle blocks, double damping, py::handle out, py::handle info, int threads) {
  invert("block_inverse", blocks, damping, out, info, false, threads);
}

void block_inverse_(py::handle out, py::handle blocks, double damping, py::handle info, int threads) {
  invert("block_inverse_", blocks, damping, out, info, true, threads);
}

void block_solve(py::handle blocks_object, double damping, py::handle rhs_object, py::handle out_object,
                 py::handle info_object, int threads) {
  constexpr const char* kFunction = "block_solve";
  const TensorView blocks = read_blocks(blocks_object, {kFunction, "blocks"});
  check_damping(damping, {kFunction, "damping"});
  const int64_t count = blocks.sizes[0], n = blocks.sizes[1];
  const TensorView rhs = read_like(rhs_object, blocks, {count, n}, {kFunction, "rhs"});
  const TensorView out = read_like(out_object, blocks, {count, n}, {kFunction, "out"});
  int64_t* const info = read_info(info_object, blocks, {kFunction, "info"});
  check_threads(threads, {kFunction, "threads"});

  const py::gil_scoped_release release;
  run(BlockSolve{blocks.data, rhs.data, out.data, info, damping, count, n, blocks.dtype, threads},
      {FISHER_KERNELS_VARIANTS(block_solve)});
}

void block_apply(py::handle inverse_object, py::handle vectors_object, py::handle out_object, int threads) {
  constexpr const char* kFunction = "block_apply";
  const TensorView inverse = read_blocks(inverse_object, {kFunction, "inverse"});
  const int64_t count = inverse.sizes[0], n = inverse.sizes[1];
  const TensorView vectors = read_like(vectors_object, inverse, {count, n}, {kFunction, "vectors"});
  const TensorView out = read_like(out_object, inverse, {count, n}, {kFunction, "out"});
  check_threads(threads, {kFunction, "threads"});

  const py::gil_scoped_release release;
  run(BlockApply{inverse.data, vectors.data, out.data, count, n, inverse.dtype, threads},
      {FISHER_KERNELS_VARIANTS(block_apply)});
}

}  // namespace fisher_kernels
