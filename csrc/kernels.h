#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/rounding.h"
#include "common/scalar.h"
#include "common/stream.h"

// The kernels, as plain functions on plain structs: no Python, no torch. Every array is in row-major order unless
// strides are given; sizes and strides count elements. The callers in python/ have checked all that is said here.
namespace fisher_kernels {

/// out[d] = sum over r of x[r, d]^2, for x [rows, columns] with unit column stride.
struct ColumnSumOfSquares {
  const void* x;
  void* out;  // [columns], accumulation_dtype(dtype)
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int threads;
};

/// out[c] = sum over n and s of x[n, c, s]^2.
struct ChannelSumOfSquares {
  const void* x;
  void* out;  // [channels], accumulation_dtype(dtype)
  DType dtype;
  bool channels_last;  // memory order (n, s, c) in place of (n, c, s)
  int64_t samples;
  int64_t channels;
  int64_t positions;
  int threads;
};

/// One spatial dimension of a convolution. Output position o reads input position o * stride + k * dilation - before
/// through kernel offset k; positions outside [0, size) hold zeros.
struct Window {
  int64_t size;
  int64_t outputs;
  int64_t kernel;
  int64_t stride;
  int64_t dilation;
  int64_t before;
};

/// out[c, k] = sum over samples n and output positions of the square of the input that kernel offset k reads there.
struct PatchSumOfSquares {
  const void* x;
  void* out;  // [channels, kernel of depth, of height, of width], accumulation_dtype(dtype)
  DType dtype;
  bool channels_last;  // memory order within a sample: (depth, height, width, c) in place of (c, depth, height, width)
  int64_t samples;
  int64_t sample_stride;
  int64_t channels;
  Window depth;
  Window height;
  Window width;
  int threads;
};

/// out = minmax(x / weight), where minmax(v) = (v - min v) / (max v - min v + eps): all ones if v is constant to
/// rounding or weight is 0, all NaN if v or its spread is not finite.
struct MinMaxVector {
  const void* x;
  void* out;
  Scalar weight;
  int64_t size;
  DType dtype;  // float32 or float64
};

struct MinMax {
  const MinMaxVector* vectors;
  int64_t count;
  double eps;
};

/// state <- decay * state + gain * (minmax(v) or v), where v is next / divisor, followed by a 1 if `next` is one entry
/// shorter than the state.
struct FactorEmaVector {
  void* state;
  const void* next;
  double divisor;
  int64_t size;       // of the state
  int64_t next_size;  // size, or size - 1
  DType dtype;        // of both: float32 or float64
};

/// Each run of `joint` consecutive vectors is refused as a whole if any v in it has a non-finite entry: its states
/// stay as they were and its `rejected` is 1, else 0.
struct FactorEma {
  const FactorEmaVector* vectors;
  int64_t count;  // a multiple of joint
  int64_t joint;
  int64_t* rejected;  // [count / joint]
  double decay;
  double gain;
  double eps;
  bool normalize;
};

/// A tensor of any strides. `contiguous` says that its elements lie in row-major order without gaps.
struct StridedArray {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int dims;
  bool contiguous;
};

/// How a step rounds a parameter and its moment where they are bfloat16: if `random`, by the upper and the lower halves
/// of the random integers of its elements.
struct StepRounding {
  RoundingIndex index;
  uint32_t base;   // of seed and ordinal, for a GPU
  uint32_t state;  // and of the step, on the CPU
  bool random;
};

/// One parameter of a step, its elements seen in row-major order as [groups, rows, columns]. The curvature of an
/// element is
///   F = row_factor[group, row] * column_factor[group, column] * constant_factor + damping,   a null factor being 1.
struct AdaFisherParameter {
  StridedArray parameter;
  StridedArray gradient;      // same dtype
  StridedArray moment;        // of moment_dtype
  const void* row_factor;     // [groups, rows] or null; accumulation_dtype(dtype), as is the other one
  const void* column_factor;  // [groups, columns] or null
  double constant_factor;     // on the CPU, of all factors that are constants
  bool row_is_constant;       // on a GPU such a factor is read where it lies
  bool column_is_constant;
  int64_t groups;
  int64_t rows;
  int64_t columns;
  float* step;       // t, which a GPU counts itself
  double step_size;  // lr / (1 - beta^t), on the CPU
  DType dtype;
  DType moment_dtype;  // accumulation_dtype(dtype), or bfloat16 where that is float32
  StepRounding rounding;

  int64_t numel() const { return groups * rows * columns; }
};

enum class WeightDecay : uint8_t {
  none,
  coupled,    // added to the gradient
  decoupled,  // taken off the parameter
};

/// g = gradient / divisor, negated to maximize. Where found_inf is not 0 nothing changes; on the CPU the caller saw to it.
struct GradientScale {
  bool maximize;
  Scalar divisor;
  Scalar found_inf;

  /// On the CPU: what gradients are multiplied by.
  double factor() const { return (maximize ? -1.0 : 1.0) / divisor.value; }
};

/// g as GradientScale says;  m <- beta * m + (1 - beta) * g;  w <- w - step_size * m / F.
/// Elements whose g is not finite stay as they are and are counted.
struct AdaFisherStep {
  const AdaFisherParameter* parameters;
  int64_t count;
  int64_t* skipped;  // [count]
  Scalar lr;
  double beta;
  double damping;
  double weight_decay;
  WeightDecay decay;
  GradientScale gradient_scale;
  int threads;
};

/// A parameter of a step or its bias.
struct MbfArrays {
  StridedArray parameter;
  StridedArray gradient;  // same dtype
  StridedArray moment;    // of moment_dtype
};

/// One inverse of a step and what it acts on: a parameter in row-major order, and a bias as one more column if there
/// is one, seen as [rows, columns]. Its inverse is one block for each row, [rows, columns, columns], or of each the
/// lower triangle row after row, [rows, columns (columns + 1) / 2]. Or all rows share one of several blocks,
/// [ceil(columns / size), size, size]: a row has blocks of `size`, and the last one is of what is left. These are for
/// the CPU; elsewhere, and where they are large, the directions come from matrix products: number k of a block of a
/// row has directions[row * row_stride + block * block_stride + k].
struct MbfParameter {
  MbfArrays weight;
  MbfArrays bias;  // [rows]
  bool biased;
  bool packed;
  bool shared;
  DType dtype;
  DType moment_dtype;      // accumulation_dtype(dtype), or bfloat16 where that is float32
  DType inverse_dtype;     // likewise
  const void* inverse;     // null where there are directions
  void* directions;        // accumulation_dtype(dtype); a GPU marks what it skips there
  int64_t row_stride;
  int64_t block_stride;
  int64_t rows;
  int64_t columns;
  int64_t size;  // columns where each row has an inverse
  int64_t* skipped;
  double* cap;    // of the layer; followed by that of the bias
  int64_t layer;  // 0 <= layer < MbfStep::layers
  double floor;   // of the layer: the same for all its parameters
  Scalar lr;
  double weight_decay;
  WeightDecay decay;
};

/// g as GradientScale says;  m <- momentum * m + g;  d = P m;  w <- w - lr * scale * cap * d.
/// scale is 1 without kl_clip and else min(1, sqrt(kl_clip / |sum of lr^2 d m|)), or of d g along the gradient.
/// cap is 1 without max_relative_step and else, for each layer,
///   min(1, max_relative_step * max(|w|, floor * sqrt(number of elements)) / (scale * |lr d|)),
/// |w| without what is not finite, 0 if |lr d|^2 overflows. Blocks whose d is not finite stay as they are, are in no sum
/// over d, and are counted.
struct MbfStep {
  const MbfParameter* parameters;
  int64_t count;
  int64_t layers;
  int64_t* skipped;  // of all parameters, biases too: a GPU sets them, the caps and the scale itself
  double* caps;
  int64_t skipped_count;
  double* scale;
  double momentum;
  GradientScale gradient_scale;
  double kl_clip;  // 0 for none
  bool along_gradient;
  double max_relative_step;  // 0 for none
  int threads;

  /// Whether the step must wait for sums.
  bool waits() const { return kl_clip > 0 || max_relative_step > 0; }
};

/// One parameter of SofimStep. No element knows its neighbours: arrays that fill their memory alike count as contiguous,
/// in whatever order.
struct SofimParameter {
  StridedArray parameter;
  StridedArray gradient;  // same dtype
  StridedArray moment;    // of moment_dtype
  int64_t size;
  Scalar lr;
  float* step;        // t, which a GPU counts itself
  double correction;  // 1 - beta^t, on the CPU
  double weight_decay;
  WeightDecay decay;
  DType dtype;
  DType moment_dtype;  // accumulation_dtype(dtype), or bfloat16 where that is float32
  StepRounding rounding;
};

/// With all parameters as one vector w, or each as one:
///   g as GradientScale says;  m <- beta * m + (1 - beta) * g;  u = m / correction;
///   w <- w - lr * (u u^T + rho I)^-1 x,   x being u or g.
/// Elements whose new m is not finite stay as they are, are in no dot product and are counted.
struct SofimStep {
  const SofimParameter* parameters;
  int64_t count;
  int64_t* skipped;  // [count]
  double* squares;   // [count], what each adds to u . u
  double beta;
  double rho;
  bool along_gradient;  // x is g
  bool by_parameter;    // each is a vector of its own
  GradientScale gradient_scale;
  int threads;
};

/// One parameter of HeavyBall. As in a SofimParameter no element knows its neighbours.
struct HeavyBallParameter {
  StridedArray parameter;
  StridedArray gradient;  // same dtype
  StridedArray moment;    // of moment_dtype
  int64_t size;
  DType dtype;
  DType moment_dtype;  // accumulation_dtype(dtype), or bfloat16 where that is float32
  StepRounding rounding;
  const float* step;  // t, which a GPU reads itself; null unless the rounding is random
};

/// g as GradientScale says, decay in coupled form;  m <- momentum * m + g.
/// Elements whose new m is not finite stay as they are and are counted.
struct HeavyBall {
  const HeavyBallParameter* parameters;
  int64_t count;
  int64_t* skipped;  // [count], zeros before
  double momentum;
  double weight_decay;  // 0 for none: then no parameter is read
  GradientScale gradient_scale;
  int threads;
};

/// One parameter of DirectionSums, likewise.
struct DirectionParameter {
  StridedArray parameter;
  StridedArray direction;  // accumulation_dtype(dtype)
  StridedArray moment;     // of moment_dtype
  int64_t size;
  DType dtype;
  DType moment_dtype;  // as in a HeavyBallParameter
};

/// sums[i] = (d . m, d . d, w . w) of parameter i; NaN where skipped[i] > 0.
struct DirectionSums {
  const DirectionParameter* parameters;
  int64_t count;
  const int64_t* skipped;  // [count] or null
  double* sums;            // [count, 3]
  bool products;           // if not, d . m is 0 and no moment is read
  bool weights;            // if not, w . w is 0 and no parameter is read
  int threads;
};

/// One parameter of CappedStep.
struct CappedParameter {
  StridedArray parameter;
  StridedArray direction;  // accumulation_dtype(dtype)
  int64_t size;
  int64_t layer;  // in order: that of the parameter before, or the next one
  Scalar lr;
  double weight_decay;
  double max_relative_step;  // infinite for none; of a layer the smallest of its parameters
  double floor;              // likewise
  DType dtype;
  StepRounding rounding;
  const float* step;  // as in a HeavyBallParameter
};

/// With the sums of DirectionSums over parameters i and layers l that have none that is not finite:
///   scale = min(1, sqrt(kl_clip / |sum of lr_i^2 (d . m)_i|)), or 1 without kl_clip;
///   factor_l = min(1, max_relative_step_l * max(|w_l|, floor_l sqrt(n_l)) / (scale sqrt(sum of lr_i^2 (d . d)_i)));
///   w_i <- w_i - lr_i (scale factor_l d_i + weight_decay_i w_i).
/// The other layers stay as they are: their factors are 0 and their elements count as skipped.
struct CappedStep {
  const CappedParameter* parameters;
  int64_t count;
  int64_t layers;
  const double* sums;  // [count, 3]
  double kl_clip;      // 0 for none
  Scalar found_inf;  // as in GradientScale
  double* scale;
  double* factors;   // [layers]
  int64_t* skipped;  // [count]
  int threads;
};

/// out = (block + damping I)^-1 for each of `count` symmetric positive definite blocks, exactly symmetric; out may be
/// blocks. info is 0 for a good block and 1 for one that has no inverse or holds what is not finite, in either
/// triangle; its out is NaN, or stays as it was. The lower triangle is what is inverted.
struct BlockInverse {
  const void* blocks;  // [count, n, n]
  void* out;           // [count, n, n]
  int64_t* info;       // [count]
  double damping;
  int64_t count;
  int64_t n;
  DType dtype;  // float32 or float64
  bool keep_bad;
  int threads;
};

/// out = (block + damping I)^-1 rhs; NaN where info is 1.
struct BlockSolve {
  const void* blocks;  // [count, n, n]
  const void* rhs;     // [count, n]
  void* out;           // [count, n]
  int64_t* info;       // [count]
  double damping;
  int64_t count;
  int64_t n;
  DType dtype;  // float32 or float64
  int threads;
};

/// out[b] = blocks[b] vectors[b].
struct BlockApply {
  const void* blocks;   // [count, n, n]
  const void* vectors;  // [count, n]
  void* out;            // [count, n]
  int64_t count;
  int64_t n;
  DType dtype;  // float32 or float64
  int threads;
};

/// Tensors of one size and dtype, each without gaps.
struct RankOneArrays {
  const void* u;
  const void* x;
  void* out;
  int64_t size;
  DType dtype;
};

/// out = (x - u (u.x) / (rho + u.u)) / rho, all arrays u being one vector to the dot products, and likewise x.
struct RankOneSolve {
  const RankOneArrays* arrays;
  int64_t count;
  double rho;
  int threads;
};

/// P <- (decay P^-1 + gain sum over j of u_j u_j^T)^-1 for each of `count` symmetric positive definite P. info is 0, or
/// 1 where the result would not be positive definite as far as can be told, or 2 where it would not be finite; there P
/// stays as it was.
struct InverseUpdate {
  void* inverse;  // [count, n, n]
  const void* u;  // [count, vectors, n]
  int64_t* info;  // [count]
  double decay;
  double gain;
  int64_t count;
  int64_t vectors;  // at least 1
  int64_t n;
  DType dtype;  // float32 or float64
  int threads;
};

/// out <- decay * out + gain * sum over r of weight[r] x[r] x[r]^T. Of out the lower triangle is read, and nothing if
/// decay is 0.
struct WeightedGram {
  const void* x;       // [rows, columns] with unit column stride
  const void* weight;  // [rows] or null for ones, accumulation_dtype(dtype)
  void* out;           // [columns, columns], accumulation_dtype(dtype)
  DType dtype;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  double decay;
  double gain;
  int threads;
};

/// out[b] <- decay * out[b] + gain * sum over samples s of v[s, b] v[s, b]^T. Of out the lower triangles are read, and
/// nothing if decay is 0.
struct MiniBlockGram {
  const void* v;  // [samples, blocks, size], each sample contiguous
  void* out;      // [blocks, size, size], accumulation_dtype(dtype)
  DType dtype;
  int64_t samples;
  int64_t sample_stride;
  int64_t blocks;
  int64_t size;
  double decay;
  double gain;
  int threads;
};

/// Samples of several channels at some positions.
struct ChannelArray {
  const void* data;
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t position_stride;  // the positions of a channel are evenly spaced
};

/// out[g] <- decay * out[g] + gain * sum over samples s and output positions of h h^T, where
///   h[i * n + k] = what kernel offset k reads there of x[s, i of group g],
/// with a 1 at the end if there is a bias. Of out the lower triangles are read, and nothing if decay is 0.
struct ConvGram {
  ChannelArray x;  // [samples, groups * channels, positions]
  void* out;       // [groups, columns, columns], accumulation_dtype(dtype)
  DType dtype;
  int64_t samples;
  int64_t groups;
  int64_t channels;  // of a group
  Window depth;
  Window height;
  Window width;
  bool bias;
  double decay;
  double gain;
  int threads;

  int64_t offsets() const { return depth.kernel * height.kernel * width.kernel; }
  int64_t positions() const { return depth.outputs * height.outputs * width.outputs; }
  int64_t columns() const { return channels * offsets() + (bias ? 1 : 0); }
};

/// out[o, i] <- decay * out[o, i] + gain * sum over samples s of w w^T, w being the gradient of kernel (o, i) by s:
///   w[k] = sum over output positions of grad_output[s, o] * what kernel offset k reads there of x[s, i of o's group].
/// Of out the lower triangles are read, and nothing if decay is 0.
struct ConvMiniBlockGram {
  ChannelArray x;            // [samples, groups * inputs, positions]
  ChannelArray grad_output;  // [samples, groups * outputs, output positions]
  void* out;                 // [groups * outputs, inputs, n, n], accumulation_dtype(dtype); n: offsets of the kernel
  DType dtype;
  int64_t samples;
  int64_t groups;
  int64_t inputs;   // channels of a group
  int64_t outputs;  // likewise
  Window depth;
  Window height;
  Window width;
  double decay;
  double gain;
  int threads;
};

/// Gradients of a batch normalisation's scale and shift by single samples:
///   shift[n, c] = sum over s of grad_output[n, c, s],
///   scale[n, c] = sum over s of grad_output[n, c, s] * (x[n, c, s] - mean[c]) / sqrt(variance[c] + eps),
/// mean and (biased) variance being those of x over n and s where they are null.
struct BatchNormGradients {
  const void* x;            // [samples, channels, positions], each sample without gaps
  const void* grad_output;  // likewise
  DType x_dtype;
  DType grad_dtype;      // float64 for float64 x, and for it alone
  const void* mean;      // [channels] or null, accumulation_dtype(x_dtype)
  const void* variance;  // [channels] or null with mean
  void* scale;           // [samples, channels]
  void* shift;           // [samples, channels]
  bool channels_last;    // memory order within a sample: (s, c) in place of (c, s), of both
  int64_t samples;
  int64_t x_sample_stride;
  int64_t grad_sample_stride;
  int64_t channels;
  int64_t positions;
  double eps;
  int threads;
};

/// out = x rounded to bfloat16, each element by the random integer of its index; the lower half of it if `low`.
struct StochasticRound {
  const float* x;  // [size]
  void* out;       // [size], bfloat16
  int64_t size;
  RoundingIndex index;
  uint32_t base;      // of seed and ordinal
  uint32_t state;     // and of the step
  const float* step;  // or null; of a GPU, which makes the state of it
  bool low;
  int threads;
};

/// Three float32 arrays of one size. first += read; second += read: three reads and two writes, as a step has. Without
/// `second`, two reads and a write, as a pass over some of its arrays has.
struct StreamArrays {
  float* first;
  float* second;  // or null
  const float* read;
  int64_t size;
};

struct StreamUpdate {
  const StreamArrays* arrays;
  int64_t count;
  int threads;
};

/// One read of all bytes but those that do not fill a few registers; *sum is a sum of them as words.
struct StreamRead {
  const char* data;
  int64_t bytes;
  uint32_t* sum;
  int threads;
};

// Every file in cpu/ is compiled once per capability, that is with the flags of one instruction set, into a namespace
// of that name. Which of them are part of the module is CMake's choice.
#define FISHER_KERNELS_DECLARE(capability)                 \
  namespace capability {                                   \
  void column_sum_of_squares(const ColumnSumOfSquares&);   \
  void channel_sum_of_squares(const ChannelSumOfSquares&); \
  void patch_sum_of_squares(const PatchSumOfSquares&);     \
  void minmax(const MinMax&);                              \
  void factor_ema_(const FactorEma&);                      \
  void adafisher_step_(const AdaFisherStep&);              \
  void mbf_step_(const MbfStep&);                          \
  void sofim_step_(const SofimStep&);                      \
  void heavy_ball_(const HeavyBall&);                      \
  void direction_sums(const DirectionSums&);               \
  void capped_step_(const CappedStep&);                    \
  void block_inverse(const BlockInverse&);                 \
  void block_solve(const BlockSolve&);                     \
  void block_apply(const BlockApply&);                     \
  void rank_one_solve(const RankOneSolve&);                \
  void inverse_update_(const InverseUpdate&);              \
  void mini_block_gram_(const MiniBlockGram&);             \
  void conv_gram_(const ConvGram&);                        \
  void conv_mini_block_gram_(const ConvMiniBlockGram&);    \
  void weighted_gram_(const WeightedGram&);                \
  void batch_norm_gradients(const BatchNormGradients&);    \
  void stochastic_round(const StochasticRound&);           \
  void stream_update(const StreamUpdate&);                 \
  void stream_read(const StreamRead&);                     \
  }

// The CUDA kernels queue their work on a stream and return. One that a GPU cannot take throws std::runtime_error, as do
// all in a module without them.
namespace cuda {

/// What the CUDA kernels were compiled with, and what is here. Versions are 1000 major + 10 minor.
struct Toolkit {
  const char* why_missing;    // null where the kernels are part of the module
  const char* architectures;  // compute capabilities as nvcc counts them, "80,90,100", the newest as PTX too
  int runtime;
  int driver;  // newest CUDA that the driver knows, 0 without a driver
};

/// How many numbers the wrappers of tensor cores have wrong, on the device: `load_transposed`, and `multiply_add` of
/// bfloat16 and of float16.
struct TensorCoreProbe {
  static constexpr int kProbes = 3;
  int64_t* wrong;
};

Toolkit toolkit();
void column_sum_of_squares(const ColumnSumOfSquares&, const Stream&);
void channel_sum_of_squares(const ChannelSumOfSquares&, const Stream&);
void patch_sum_of_squares(const PatchSumOfSquares&, const Stream&);
void minmax(const MinMax&, const Stream&);
void factor_ema_(const FactorEma&, const Stream&);
void adafisher_step_(const AdaFisherStep&, const Stream&);
void mbf_step_(const MbfStep&, const Stream&);
void sofim_step_(const SofimStep&, const Stream&);
void heavy_ball_(const HeavyBall&, const Stream&);
void direction_sums(const DirectionSums&, const Stream&);
void capped_step_(const CappedStep&, const Stream&);
void block_inverse(const BlockInverse&, const Stream&);
void block_solve(const BlockSolve&, const Stream&);
void block_apply(const BlockApply&, const Stream&);
void rank_one_solve(const RankOneSolve&, const Stream&);
void inverse_update_(const InverseUpdate&, const Stream&);
void mini_block_gram_(const MiniBlockGram&, const Stream&);
void conv_gram_(const ConvGram&, const Stream&);
void conv_mini_block_gram_(const ConvMiniBlockGram&, const Stream&);
void weighted_gram_(const WeightedGram&, const Stream&);
void batch_norm_gradients(const BatchNormGradients&, const Stream&);
void stochastic_round(const StochasticRound&, const Stream&);
void probe_tensor_cores(const TensorCoreProbe&, const Stream&);
}  // namespace cuda

FISHER_KERNELS_DECLARE(baseline)
FISHER_KERNELS_DECLARE(avx2)
FISHER_KERNELS_DECLARE(avx512)
#undef FISHER_KERNELS_DECLARE

}  // namespace fisher_kernels
