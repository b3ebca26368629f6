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
    for (int c = 0; c < smaller(n, kPiece<A>); ++c) store(entries + (first + c) * kStep, columns[c]);
  }
}

template <class T>
void prefetch(const T* v, int64_t size) {
  const char* const bytes = reinterpret_cast<const char*>(v);
  for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += kCacheLine) __builtin_prefetch(bytes + i, 0, 2);
}

template <class T>
void mini_block_gram(const MiniBlockGram& a) {
  using A = Accumulator<T>;
  constexpr int64_t kStep = kLanes<T>;
  const T* const v = static_cast<const T*>(a.v);
  A* const out = static_cast<A*>(a.out);
  const int64_t n = a.size, entries_size = kRun * n * kStep, totals_size = triangle(n) * kStep;
  const int64_t staged_size = (n + kPiece<A>) * kStep;
  const A decay = static_cast<A>(a.decay), gain = static_cast<A>(a.gain);
  const auto group_at = [&](int64_t g) {
    return Group<T>{v + g * kStep * n, smaller(kStep, a.blocks - g * kStep), n};
  };
  const int64_t groups = ceil_div(a.blocks, kStep), scratch_size = entries_size + totals_size + staged_size;
  const int threads = static_cast<int>(
      larger(1, smaller(groups, useful_threads(a.blocks * n * (a.samples + n), a.threads))));
  const Scratch<A> scratch(threads * scratch_size + kStep);
  const auto sum_groups = [&](int thread, int64_t begin, int64_t end) {
    A* const entries = align(scratch.data()) + thread * scratch_size;
    A* const totals = entries + entries_size;
    A* const staged = totals + totals_size;
    for (int64_t i = 0; i < staged_size; ++i) staged[i] = 0;
    for (int64_t i = 0; i < totals_size; ++i) totals[i] = 0;  // what is left of no samples
    for (int64_t g = begin; g < end; ++g) {
      const Group<T> group = group_at(g);
      for (int64_t first = 0; first < a.samples; first += kRun) {
        const int64_t samples = smaller(kRun, a.samples - first);
        for (int64_t s = 0; s < samples; ++s) {
          const int64_t ahead = first + s + kRun;  // a jump from sample to sample is more than the hardware foresees
          if (ahead < a.samples) {
            prefetch(group.sample(ahead, a.sample_stride), group.size());
          } else if (g + 1 < end && ahead - a.samples < a.samples) {
            prefetch(group_at(g + 1).sample(ahead - a.samples, a.sample_stride), group_at(g + 1).size());
          }
          transpose(group.sample(first + s, a.sample_stride), group, staged, entries + s * n * kStep);
        }
        add_run(Run<A>{entries, samples, n, first == 0}, totals);
      }
      for (int64_t lane = 0; lane < group.blocks; ++lane) {
        write_block(totals + lane, n, decay, gain, out + (g * kStep + lane) * n * n);
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
