#include "../kernels.h"
#include "capability.h"
#include "entry_points.h"
#include "tensor.h"

namespace fisher_kernels {

void mini_block_gram_(py::handle out_object, py::handle v_object, double decay, double gain, int threads) {
  constexpr const char* kFunction = "mini_block_gram_";
  const Argument out_argument{kFunction, "out"}, v_argument{kFunction, "v"};
  const TensorView v = read_tensor(v_object, v_argument);
  check_float(v, v_argument);
  check_dims(v, 3, v_argument);
  const int64_t samples = v.sizes[0], blocks = v.sizes[1], n = v.sizes[2];
  const TensorView sample{v.data, v.sizes + 1, v.strides + 1, 2, v.dtype};
  if (v.numel() > 0) check_contiguous(sample, v_argument);
  const TensorView out = read_tensor(out_object, out_argument);
  check_dtype(out, accumulation_dtype(v.dtype), out_argument);
  check_shape(out, {blocks, n, n}, out_argument);
  check_contiguous(out, out_argument);
  check_coefficient(decay, {kFunction, "decay"});
  check_coefficient(gain, {kFunction, "gain"});
  check_threads(threads, {kFunction, "threads"});

  const py::gil_scoped_release release;
  run(MiniBlockGram{v.data, out.data, v.dtype, samples, v.strides[0], blocks, n, decay, gain, threads},
      {FISHER_KERNELS_VARIANTS(mini_block_gram_)});
}

}  // namespace fisher_kernels
