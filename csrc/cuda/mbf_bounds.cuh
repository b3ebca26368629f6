#pragma once

#include "mbf_plan.cuh"

// What comes before the first pass of a mini-block Fisher step, its coefficients, and what comes between the passes: the
// scale and the caps, from the sums of tiles.
namespace fisher_kernels::cuda::mbf {

namespace preparing {

struct Results {
  int64_t* skipped;
  double* caps;
  int64_t count;
  double* scale;
};

/// Nothing skipped, and nothing shortened.
static __global__ void __launch_bounds__(kThreads) clear(const __grid_constant__ Results results) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < results.count) {
    results.skipped[i] = 0;
    results.caps[i] = 1;
  }
  if (i == 0) *results.scale = 1;
}

struct Shared {
  GradientScale gradient_scale;
  double momentum;
};

/// A parameter, which is one block's.
struct Entry {
  Scalar lr;
  double weight_decay;
  WeightDecay decay;
  Coefficients* coefficients;
};

static __global__ void __launch_bounds__(kWarp) find_coefficients(const __grid_constant__ Table<Entry, Shared> table) {
  if (threadIdx.x != 0) return;
  const Shared& shared = table.shared;
  const Entry& entry = table.entries[blockIdx.x];
  const double lr = load(entry.lr), coupled = entry.decay == WeightDecay::coupled ? entry.weight_decay : 0,
               decoupled = entry.decay == WeightDecay::decoupled ? entry.weight_decay : 0;
  const Rates<double> rates{factor(shared.gradient_scale), shared.momentum, coupled, lr, lr * decoupled,
                            is_off(shared.gradient_scale)};
  entry.coefficients->in_double = rates;
  entry.coefficients->in_float = {static_cast<float>(rates.gradient_scale), static_cast<float>(rates.momentum),
                                  static_cast<float>(rates.weight_decay),   static_cast<float>(rates.step_size),
                                  static_cast<float>(rates.shrinkage),      rates.off};
}

inline void launch(const MbfStep& step, const Plan& plan, const Stream& stream) {
  const auto blocks = static_cast<unsigned>(divide_up<int64_t>(step.skipped_count + 1, kThreads));
  cuda::launch(kName, clear, blocks, kThreads, 0, stream,
               Results{step.skipped, step.caps, step.skipped_count, step.scale});
  TableWriter<Table<Entry, Shared>> table(kName, find_coefficients, kWarp, 0, stream,
                                          Shared{step.gradient_scale, step.momentum});
  for (const Item& item : plan.items) {
    const MbfParameter& p = *item.parameter;
    table.add({p.lr, p.weight_decay, p.decay, item.entry.coefficients}, 1);
  }
  table.flush();
}

}  // namespace preparing

namespace bounds {

constexpr int kClipThreads = 1024;

struct Shared {
  GradientScale gradient_scale;
  Total* totals;
  int64_t count;  // of all totals
  const double* scale;
  double max_relative_step;  // 0 for none
};

/// Tiles that a block of threads adds up. Of a parameter that has more, blocks add up pieces of as many first, each in
/// the place of its first tile: one block alone would take a good part of the time of that parameter's step.
constexpr int64_t kPiece = 1024;

using Partials = double[3][kWarps];

/// The sum over every so many of a block's tiles, in its first thread. All threads call it.
__device__ inline Sums add(const Sums* sums, int64_t count, int64_t every, Partials& partials) {
  Sums own{};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const Sums more = sums[i * every];
    own.change += more.change;
    own.square += more.square;
    own.weight += more.weight;
  }
  return {block_sum(own.change, partials[0]), block_sum(own.square, partials[1]), block_sum(own.weight, partials[2])};
}

/// A parameter of several pieces.
struct LongEntry {
  Sums* sums;
  int64_t tiles;
};

static __global__ void __launch_bounds__(kThreads)
    add_pieces(const __grid_constant__ Table<LongEntry, GradientScale> table) {
  if (is_off(table.shared)) return;
  const int i = table.tensor_of(blockIdx.x);
  const LongEntry& entry = table.entries[i];
  const int64_t first = (blockIdx.x - table.start[i]) * kPiece, left = entry.tiles - first;
  const Sums sum = add(entry.sums + first, left < kPiece ? left : kPiece, 1, shared_memory<Partials>());
  if (threadIdx.x == 0) entry.sums[first] = sum;  // all have read theirs
}

/// A parameter, which is one block's.
struct Entry {
  const Sums* sums;
  int64_t count;  // of those to be added, which are so far apart
  int64_t every;
  Coefficients* coefficients;  // null where it has no elements, and a cap all the same
  double* cap;
  int64_t elements;
  int64_t layer;
  double floor;   // of the layer
  int64_t index;  // among all totals
  bool biased;
};

/// The sums over all tiles of a parameter.
static __global__ void __launch_bounds__(kThreads) add_tiles(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  if (is_off(shared.gradient_scale)) return;
  const Entry& entry = table.entries[blockIdx.x];
  Total total{add(entry.sums, entry.count, entry.every, shared_memory<Partials>()), 0, 0};
  if (threadIdx.x != 0) return;
  const double lr = entry.coefficients->in_double.step_size;
  total.change *= lr * lr;
  total.square *= lr * lr;
  total.elements = entry.elements;
  total.layer = entry.layer;
  shared.totals[entry.index] = total;
}

/// What shortens the step of a parameter, from the sums of its layer. All blocks of a layer add up the same in the same
/// order.
static __global__ void __launch_bounds__(kThreads) shorten(const __grid_constant__ Table<Entry, Shared> table) {
  const Shared& shared = table.shared;
  if (is_off(shared.gradient_scale)) return;
  auto& partials = shared_memory<Partials>();
  const Entry& entry = table.entries[blockIdx.x];
  double cap = 1;
  if (shared.max_relative_step > 0) {
    double square = 0, weight = 0, elements = 0;
    for (int64_t i = threadIdx.x; i < shared.count; i += kThreads) {
      const Total& total = shared.totals[i];
      if (total.layer != entry.layer) continue;
      square += total.square;
      weight += total.weight;
      elements += static_cast<double>(total.elements);
    }
    square = block_sum(square, partials[0]);
    weight = sqrt(block_sum(weight, partials[1]));
    const double least = entry.floor * sqrt(block_sum(elements, partials[2])),
                 bound = shared.max_relative_step * (weight > least ? weight : least),
                 length = *shared.scale * sqrt(square);  // not finite if the sum overflows
    cap = length <= bound ? 1.0 : is_finite(length) ? bound / length : 0.0;
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; k <= entry.biased; ++k) entry.cap[k] = cap;
  if (entry.coefficients == nullptr) return;
  Coefficients& coefficients = *entry.coefficients;
  const double rate = coefficients.in_double.step_size * *shared.scale * cap;
  coefficients.in_double.step_size = rate;
  coefficients.in_float.step_size = static_cast<float>(rate);
}

struct Clip {
  GradientScale gradient_scale;
  const Total* totals;
  int64_t count;
  double kl_clip;
  double* scale;
};

/// The scale at which the change keeps to its bound.
static __global__ void __launch_bounds__(kClipThreads) find_scale(const __grid_constant__ Clip clip) {
  if (is_off(clip.gradient_scale)) return;
  auto& partials = shared_memory<double[kClipThreads / kWarp]>();
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < clip.count; i += kClipThreads) sum += clip.totals[i].change;
  const double size = fabs(block_sum(sum, partials));
  if (threadIdx.x == 0 && size > clip.kl_clip) *clip.scale = sqrt(clip.kl_clip / size);
}

/// From the sums of tiles to how long steps are.
inline void launch(const MbfStep& step, const Plan& plan, char* memory, const Stream& stream) {
  Total* const totals = plan.totals(memory);
  TableWriter<Table<LongEntry, GradientScale>> pieces(kName, add_pieces, kThreads, sizeof(Partials), stream,
                                                      step.gradient_scale);
  for (const Item& item : plan.items) {
    const int64_t tiles = tiles_of(item);
    if (tiles > kPiece) pieces.add({item.entry.sums, tiles}, divide_up(tiles, kPiece));
  }
  pieces.flush();
  const Shared shared{step.gradient_scale, totals, plan.count(), step.scale, step.max_relative_step};
  using Writer = TableWriter<Table<Entry, Shared>>;
  const auto for_items = [&](auto* kernel, const auto& add_more) {
    Writer table(kName, kernel, kThreads, sizeof(Partials), stream, shared);
    for (int64_t i = 0; i < plan.count(); ++i) {
      const Item& item = plan.items[i];
      const MbfParameter& p = *item.parameter;
      const int64_t tiles = tiles_of(item), every = tiles > kPiece ? kPiece : 1;
      table.add({item.entry.sums, divide_up(tiles, every), every, item.entry.coefficients, p.cap, p.rows * p.columns,
                 p.layer, p.floor, i, p.biased},
                1);
    }
    add_more(table);
    table.flush();
  };
  for_items(add_tiles, [](Writer&) {});
  if (step.kl_clip > 0) {
    cuda::launch(kName, find_scale, 1, kClipThreads, sizeof(double[kClipThreads / kWarp]), stream,
                 Clip{step.gradient_scale, totals, plan.count(), step.kl_clip, step.scale});
  }
  for_items(shorten, [&](Writer& table) {
    for (int64_t i = 0; i < step.count; ++i) {
      const MbfParameter& p = step.parameters[i];
      if (p.rows * p.columns == 0) table.add({nullptr, 0, 1, nullptr, p.cap, 0, p.layer, p.floor, 0, p.biased}, 1);
    }
  });
}

}  // namespace bounds

}  // namespace fisher_kernels::cuda::mbf
