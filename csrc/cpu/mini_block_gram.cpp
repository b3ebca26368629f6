#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "mini_blocks.h"
#include "parallel.h"
#include "scratch.h"
#include "transpose.h"
#include "vector.h"

// One block per lane: a group of kLanes blocks is turned into registers of entries, and every product of two entries
// is one instruction for the group. Lanes never meet, so that a block's result depends on nothing but its own vectors.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kRun = 32;  // samples summed before their sum is added to the total
constexpr int64_t kCacheLine = 64;
constexpr int64_t kStripBytes = 4096;  // of a sample that are read one after the other

template <class T>
T* align(T* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<T*>((address + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
}

/// The blocks that share a register.
template <class T>
struct Group {
  const T* v;  // of the first sample
  int64_t blocks;
  int64_t n;

  const T* sample(int64_t s, int64_t stride) const { return v + s * stride; }
  int64_t size() const { return blocks * n; }
};

/// entries[c] = entry c of each block of a group, for c < n. Rows narrower than a piece, 16-bit ones and those of a
/// group that is not full go through `staged`, which is that much larger.
template <class T>
void transpose(const T* v, const Group<T>& group, Accumulator<T>* staged, Accumulator<T>* entries) {
  using A = Accumulator<T>;
  constexpr int kStep = kLanes<T>;
  const int64_t n = group.n;
  const A* rows = staged;
  bool in_place = false;
  if constexpr (std::is_same_v<T, A>) {
    in_place = group.blocks == kStep && n >= kPiece<A>;
    if (in_place) rows = v;
  }
  if (!in_place) {
    int64_t i = 0;
    for (; i + kStep <= group.size(); i += kStep) store(staged + i, load(v + i));
    for (; i < group.size(); ++i) staged[i] = widen(v[i]);
  }
  for (int64_t next = 0; next < n; next += kPiece<A>) {
    const int64_t first = larger(0, smaller(next, n - kPiece<A>));  // the last piece begins early, to end with the row
    Vector<A> columns[kPiece<A>];
    transpose_piece(rows + first, n, columns);
    if (n < kPiece<A>) {
      for (int c = 0; c < n; ++c) store(entries + c * kStep, columns[c]);
    } else {
#pragma GCC unroll 4
      for (int c = 0; c < kPiece<A>; ++c) store(entries + (first + c) * kStep, columns[c]);
    }
  }
}

/// Rows of bytes that are fetched into the second-level cache one after the other, a few lines at a time: what the
/// hardware does not foresee, since they are far apart.
class Ahead {
 public:
  Ahead(const void* rows, int64_t count, int64_t stride, int64_t size)
      : row_(static_cast<const char*>(rows)), count_(count), stride_(stride), size_(size) {}

  void fetch(int64_t lines) {
    for (; lines > 0 && count_ > 0; --lines) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += kCacheLine;
      if (at_ >= size_) {
        at_ = 0;
        row_ += stride_;
        --count_;
      }
    }
  }

 private:
  const char* row_;
  int64_t count_;
  int64_t stride_;
  int64_t size_;
  int64_t at_ = 0;
};

/// entries[s, c] = entry c of each block of a group in sample s, for the samples from v on, which are `stride` apart.
/// Fetches some lines for each. kOdd: n, or 0 for any.
template <class T, int kOdd>
void transpose_samples(const T* v, int64_t stride, int64_t samples, const Group<T>& group, int64_t lines, Ahead& ahead,
                       Accumulator<T>* staged, Accumulator<T>* entries) {
  const int64_t step = group.n * kLanes<T>;
  for (; samples > 0; --samples, v += stride, entries += step) {
    ahead.fetch(lines);
    if constexpr (kOdd > 0) {
      transpose_odd<T, kOdd>(v, entries);
    } else {
      transpose(v, group, staged, entries);
    }
  }
}

/// The fastest of them for full groups.
template <class T>
auto transpose_full(int64_t n) {
  if constexpr (kTransposesOdd) {
    if (n == 1) return transpose_samples<T, 1>;
    if (n == 3) return transpose_samples<T, 3>;
    if (n == 5) return transpose_samples<T, 5>;
    if (n == 7) return transpose_samples<T, 7>;
    if (n == 9) return transpose_samples<T, 9>;
  }
  return transpose_samples<T, 0>;
}

template <class T>
void mini_block_gram(const MiniBlockGram& a) {
  using A = Accumulator<T>;
  constexpr int64_t kStep = kLanes<T>, kBytes = sizeof(T);
  const T* const v = static_cast<const T*>(a.v);
  A* const out = static_cast<A*>(a.out);
  const int64_t n = a.size, entries_size = kRun * n * kStep, totals_size = triangle(n) * kStep;
  const int64_t staged_size = (n + kPiece<A>) * kStep;
  const A decay = static_cast<A>(a.decay), gain = static_cast<A>(a.gain);
  const auto transpose_group = transpose_full<T>(n);
  const auto group_at = [&](int64_t g) {
    return Group<T>{v + g * kStep * n, smaller(kStep, a.blocks - g * kStep), n};
  };
  // Groups that lie side by side and are summed a run after the other.
  const int64_t groups = ceil_div(a.blocks, kStep);
  const int64_t strip = larger(1, smaller(groups, kStripBytes / larger(1, kStep * n * kBytes)));
  // What is fetched for a sample of a group, all but a line for each tile: while a run is summed memory would be idle.
  const int64_t lines = ceil_div(kStep * n * kBytes, kCacheLine) - tiles_of(n);
  const int64_t scratch_size = entries_size + strip * totals_size + staged_size;
  const int threads = static_cast<int>(
      larger(1, smaller(groups, useful_threads(a.blocks * n * (a.samples + n), a.threads))));
  const Scratch<A> scratch(threads * scratch_size + kStep);
  const auto sum_groups = [&](int thread, int64_t begin, int64_t end) {
    A* const entries = align(scratch.data()) + thread * scratch_size;
    A* const totals = entries + entries_size;
    A* const staged = totals + strip * totals_size;
    for (int64_t i = 0; i < staged_size; ++i) staged[i] = 0;
    // A run of samples of the strip from group g on.
    const auto rows_at = [&](int64_t g, int64_t sample) {
      const int64_t blocks = smaller(smaller(strip, end - g) * kStep, a.blocks - g * kStep);
      return Ahead(v + sample * a.sample_stride + g * kStep * n, blocks > 0 ? smaller(kRun, a.samples - sample) : 0,
                   a.sample_stride * kBytes, blocks * n * kBytes);
    };
    for (int64_t g = begin; g < end; g += strip) {
      const int64_t count = smaller(strip, end - g);
      if (a.samples == 0) {
        for (int64_t i = 0; i < count * totals_size; ++i) totals[i] = 0;
      }
      for (int64_t first = 0; first < a.samples; first += kRun) {
        const int64_t samples = smaller(kRun, a.samples - first);
        Ahead ahead = first + kRun < a.samples ? rows_at(g, first + kRun) : rows_at(g + strip, 0);
        for (int64_t k = 0; k < count; ++k) {
          const Group<T> group = group_at(g + k);
          (group.blocks == kStep ? transpose_group : transpose_samples<T, 0>)(
              group.sample(first, a.sample_stride), a.sample_stride, samples, group, lines, ahead, staged, entries);
          add_run(Run<A>{entries, samples, n, first == 0}, totals + k * totals_size, [&] { ahead.fetch(1); });
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        write_blocks(totals + k * totals_size, group_at(g + k).blocks, n, decay, gain, out + (g + k) * kStep * n * n,
                     n * n);
      }
    }
  };
  parallel_for(threads, groups, sum_groups);
}

}  // namespace

void mini_block_gram_(const MiniBlockGram& a) {
  with_type(a.dtype, [&](auto* type) { mini_block_gram<std::remove_pointer_t<decltype(type)>>(a); });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
