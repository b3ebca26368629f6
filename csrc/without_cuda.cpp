#include <stdexcept>
#include <string>

#include "kernels.h"

// Stands in for cuda/ in a module that was compiled without.
namespace fisher_kernels::cuda {

#define FISHER_KERNELS_MISSING(kernel, Arguments)                                            \
  void kernel(const Arguments&, const Stream&) {                                             \
    throw std::runtime_error(#kernel ": this module has no CUDA kernels: " FISHER_KERNELS_WHY_NO_CUDA); \
  }

Toolkit toolkit() { return {FISHER_KERNELS_WHY_NO_CUDA, nullptr, 0, 0}; }

FISHER_KERNELS_MISSING(column_sum_of_squares, ColumnSumOfSquares)
FISHER_KERNELS_MISSING(channel_sum_of_squares, ChannelSumOfSquares)
FISHER_KERNELS_MISSING(patch_sum_of_squares, PatchSumOfSquares)
FISHER_KERNELS_MISSING(minmax, MinMax)
FISHER_KERNELS_MISSING(factor_ema_, FactorEma)
FISHER_KERNELS_MISSING(adafisher_step_, AdaFisherStep)
FISHER_KERNELS_MISSING(mbf_step_, MbfStep)
FISHER_KERNELS_MISSING(sofim_step_, SofimStep)
FISHER_KERNELS_MISSING(heavy_ball_, HeavyBall)
FISHER_KERNELS_MISSING(direction_sums, DirectionSums)
FISHER_KERNELS_MISSING(capped_step_, CappedStep)
FISHER_KERNELS_MISSING(block_inverse, BlockInverse)
FISHER_KERNELS_MISSING(block_solve, BlockSolve)
FISHER_KERNELS_MISSING(block_apply, BlockApply)
FISHER_KERNELS_MISSING(rank_one_solve, RankOneSolve)
FISHER_KERNELS_MISSING(inverse_update_, InverseUpdate)
FISHER_KERNELS_MISSING(mini_block_gram_, MiniBlockGram)
FISHER_KERNELS_MISSING(conv_gram_, ConvGram)
FISHER_KERNELS_MISSING(conv_mini_block_gram_, ConvMiniBlockGram)
FISHER_KERNELS_MISSING(weighted_gram_, WeightedGram)
FISHER_KERNELS_MISSING(batch_norm_gradients, BatchNormGradients)
FISHER_KERNELS_MISSING(stochastic_round, StochasticRound)
FISHER_KERNELS_MISSING(probe_tensor_cores, TensorCoreProbe)

}  // namespace fisher_kernels::cuda
