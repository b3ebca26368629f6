#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "panels.h"
#include "parallel.h"
#include "scratch.h"
#include "vector.h"

// A block of rows is packed into panels of a few registers' columns, then tiles of the lower triangle are summed in
// registers from two panels each. What a block, a run or a tile is depends on the shape alone, so that any number of
// threads gives the same bits.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kMinBlock = 512, kMaxBlock = 8192;  // rows packed at a time
constexpr int64_t kPackedBytes = 8 << 20;             // of a block within these bounds, so that it stays in a cache
constexpr int64_t kRun = 64;     // rows summed in registers: one panel of them fills a quarter of the first-level cache
constexpr int64_t kRange = 64;   // rows of the result in a task, which share a panel while it is in that cache

/// panel[r, i] = weight[r] * x[r, i], and zeros where i >= columns; a null weight being ones.
template <class T, class A>
void pack_panel(const T* x, int64_t stride, const A* weight, int64_t rows, int64_t columns, A* panel) {
  constexpr int kStep = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, x += stride, panel += kWidth<A>) {
    const A scale = weight ? weight[r] : A(1);
    for (int i = 0; i < kWidth<A>; i += kStep) {
      const int64_t left = columns - i;
      const Vector<T> value = left >= kStep ? load(x + i) : left > 0 ? load(x + i, left) : Vector<T>{};
      store(panel + i, scale * value);
    }
  }
}

/// A task: rows [row, row + rows) of the lower triangle, in the columns of a panel.
struct Task {
  int64_t row;
  int64_t rows;
  int64_t panel;
};

/// Task `index` of those that cover the lower triangle; ranges of rows one after the other, each with its panels.
template <class A>
Task task_at(int64_t index, int64_t columns) {
  int64_t row = 0;
  const auto panels = [&] { return ceil_div(smaller(row + kRange, columns), kWidth<A>); };
  for (; index >= panels(); row += kRange) index -= panels();
  return {row, smaller(kRange, columns - row), index};
}

template <class A>
int64_t count_tasks(int64_t columns) {
  int64_t count = 0;
  for (int64_t row = 0; row < columns; row += kRange) count += ceil_div(smaller(row + kRange, columns), kWidth<A>);
  return count;
}

/// totals [kRange, kWidth] = sum over the packed rows of left * right.
template <class A>
void sum_task(const Task& task, const A* left, const A* right, int64_t rows, A* totals) {
  for (int64_t i = 0; i < kRange * kWidth<A>; ++i) totals[i] = 0;
  const int64_t above = larger(0, task.panel * kWidth<A> - task.row);  // rows that end before the panel begins
  for (int64_t first = 0; first < rows; first += kRun) {
    const int64_t run = smaller(kRun, rows - first);
    for (int64_t i = above / kTileRows * kTileRows; i < task.rows; i += kTileRows) {
      const int64_t column = task.row + i, panel = column / kWidth<A>;
      add_products(left + (panel * rows + first) * kWidth<A> + column % kWidth<A>,
                   right + (task.panel * rows + first) * kWidth<A>, run, totals + i * kWidth<A>);
    }
  }
}

/// out <- decay * out + gain * totals in the lower triangle, and the same above it if `mirrored`.
template <class A>
void write_task(const Task& task, A* totals, int64_t columns, A decay, A gain, bool mirrored, A* out) {
  const int64_t column = task.panel * kWidth<A>, width = smaller(kWidth<A>, columns - column);
  for (int64_t i = larger(0, column - task.row); i < task.rows; ++i) {
    A* const row = out + (task.row + i) * columns + column;
    A* const total = totals + i * kWidth<A>;
    const int64_t end = smaller(width, task.row + i - column + 1);
    for (int64_t j = 0; j < end; ++j) total[j] *= gain;
    if (decay != 0) {
      for (int64_t j = 0; j < end; ++j) total[j] += decay * row[j];
    }
    for (int64_t j = 0; j < end; ++j) row[j] = total[j];
  }
  if (!mirrored) return;
  for (int64_t j = 0; j < width; ++j) {
    A* const row = out + (column + j) * columns + task.row;
    for (int64_t i = larger(0, column + j - task.row); i < task.rows; ++i) row[i] = totals[i * kWidth<A> + j];
  }
}

template <class T>
void weighted_gram(const WeightedGram& a) {
  using A = Accumulator<T>;
  const T* const x = static_cast<const T*>(a.x);
  const A* const weight = static_cast<const A*>(a.weight);
  A* const out = static_cast<A*>(a.out);
  const int64_t columns = a.columns;
  if (columns == 0) return;
  const int64_t panels = ceil_div(columns, kWidth<A>), tasks = count_tasks<A>(columns);
  const int64_t fitting = kPackedBytes / (panels * kWidth<A> * static_cast<int64_t>(sizeof(A)));
  const int64_t block = larger(kMinBlock, smaller(kMaxBlock, fitting / kRun * kRun));
  const int64_t packed_size = panels * kWidth<A> * smaller(block, a.rows);
  const Scratch<A> scratch((weight ? 2 : 1) * packed_size + kLanes<A>);
  A* const right = align(scratch.data());
  A* const left = weight ? right + packed_size : right;
  for (int64_t first = 0; first == 0 || first < a.rows; first += block) {
    const int64_t rows = smaller(block, a.rows - first);
    parallel_for(useful_threads(rows * columns, a.threads), panels, [&](int, int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kWidth<A>, place = column * rows;
        const T* const from = x + first * a.row_stride + column;
        pack_panel<T, A>(from, a.row_stride, nullptr, rows, columns - column, right + place);
        if (weight) pack_panel(from, a.row_stride, weight + first, rows, columns - column, left + place);
      }
    });
    const A decay = static_cast<A>(first == 0 ? a.decay : 1.0), gain = static_cast<A>(a.gain);
    const bool is_last = first + block >= a.rows;
    const int64_t work = (rows / 16 + 1) * columns * columns;
    parallel_for(useful_threads(work, a.threads), tasks, [&](int, int64_t begin, int64_t end) {
      alignas(kVectorBytes) A totals[kRange * kWidth<A>];
      for (int64_t i = begin; i < end; ++i) {
        const Task task = task_at<A>(i, columns);
        sum_task<A>(task, left, right, rows, totals);
        write_task(task, totals, columns, decay, gain, is_last, out);
      }
    });
  }
}

}  // namespace

void weighted_gram_(const WeightedGram& a) {
  with_type(a.dtype, [&](auto* type) { weighted_gram<std::remove_pointer_t<decltype(type)>>(a); });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
