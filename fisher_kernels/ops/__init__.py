"""The kernels as functions on tensors; each calls an op of ``torch.ops.fisher_kernels``."""

from fisher_kernels.ops._define import ACCUMULATOR
from fisher_kernels.ops._rounding import Rounding
from fisher_kernels.ops.adafisher_step import adafisher_step_
from fisher_kernels.ops.batch_norm_gradients import batch_norm_gradients
from fisher_kernels.ops.block_inverse import block_apply, block_inverse, block_inverse_, block_solve
from fisher_kernels.ops.capped_step import capped_step_, direction_sums, heavy_ball_
from fisher_kernels.ops.conv_gram import conv_gram_
from fisher_kernels.ops.factor_ema import factor_ema_, minmax, minmax_
from fisher_kernels.ops.gram import weighted_gram_
from fisher_kernels.ops.mbf_step import mbf_step_
from fisher_kernels.ops.mini_block_gram import conv_mini_block_gram_, mini_block_gram_
from fisher_kernels.ops.rank_one import low_rank_inverse_update_, rank_one_inverse_update_, rank_one_solve
from fisher_kernels.ops.sofim_step import sofim_step_
from fisher_kernels.ops.stochastic_round import stochastic_round
from fisher_kernels.ops.sum_of_squares import channel_sum_of_squares, column_sum_of_squares, patch_sum_of_squares

__all__ = [
    "ACCUMULATOR",
    "Rounding",
    "adafisher_step_",
    "batch_norm_gradients",
    "block_apply",
    "block_inverse",
    "block_inverse_",
    "block_solve",
    "capped_step_",
    "channel_sum_of_squares",
    "column_sum_of_squares",
    "conv_gram_",
    "conv_mini_block_gram_",
    "direction_sums",
    "factor_ema_",
    "heavy_ball_",
    "low_rank_inverse_update_",
    "mbf_step_",
    "mini_block_gram_",
    "minmax",
    "minmax_",
    "patch_sum_of_squares",
    "rank_one_inverse_update_",
    "rank_one_solve",
    "sofim_step_",
    "stochastic_round",
    "weighted_gram_",
]
