#include "convolution.cuh"
#include "gram.cuh"
#include "kernels.h"

// The factor of a convolution's input: the Gram matrix of patches, for each group. Tiles, shares and sums are those of
// rows that lie in memory; what differs is how rows are read. They are gathered from x where it lies, nothing is
// unfolded: a thread has one column of either side, that is a channel and how far into a window it reads, and where
// the windows of a run begin is a table in shared memory, of which the next one is filled while a run is multiplied.
namespace fisher_kernels::cuda {

namespace {

constexpr const char* kName = "conv_gram_";

struct Patches : Convolution {
  const void* x;
  int64_t x_sample;
  int64_t x_group;
  uint32_t x_channel;
  bool bias;
};

/// Where the window of a row begins, and its sample.
struct alignas(16) RowPlace {
  Place window;
  int64_t sample;  // distance from the first one
};

template <class Traits>
struct PatchMemory {
  GramMemory<Traits> gram;
  RowPlace rows[2][kGramRun];  // of a run, and of the next one
};

/// What a thread reads: a number in some rows of a slab, for the rows and for the columns of a tile.
template <class Traits>
class PatchReader {
 public:
  using T = typename Traits::T;
  using A = typename Traits::A;
  static constexpr int kRows = Traits::kThreads / Traits::kTile;  // that all threads read at once
  static constexpr int kPasses = Traits::kDepth / kRows;
  static constexpr int kSlabs = kGramRun / Traits::kDepth;  // of a run
  static_assert(Traits::kDepth % kRows == 0 && kGramRun % Traits::kDepth == 0);

  __device__ PatchReader(const Gram& gram, const Patches& patches, int64_t group, const TilePlace& place,
                         RowPlace (&rows)[2][kGramRun])
      : gram_(gram),
        patches_(patches),
        x_(static_cast<const T*>(patches.x) + group * patches.x_group),
        rows_(rows),
        row_(static_cast<int>(threadIdx.x) / Traits::kTile),
        column_(static_cast<int>(threadIdx.x) % Traits::kTile),
        is_diagonal_(place.row == place.column),
        left_(column_at(static_cast<int64_t>(place.row) * Traits::kTile + column_)),
        right_(column_at(static_cast<int64_t>(place.column) * Traits::kTile + column_)) {
    fill(0);
    __syncthreads();
  }

  /// Finds the rows of the next run before the first slab of a run is read: those of the last run are behind a barrier.
  __device__ void prepare(int slab) {
    if (slab % kSlabs == 0) fill(slab / kSlabs + 1);
  }

  __device__ void fetch(int slab, int rows) {
    const RowPlace* const places = rows_[slab / kSlabs % 2] + slab % kSlabs * Traits::kDepth + row_;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const bool there = row_ + p * kRows < rows;
      const RowPlace place = places[p * kRows];
      fetched_right_[p] = read(right_, place, there);
      fetched_left_[p] = is_diagonal_ ? fetched_right_[p] : read(left_, place, there);
    }
  }

  __device__ void store(Slab<Traits>& slab) const {
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      slab.left[row_ + p * kRows][column_] = widen(fetched_left_[p]);
      slab.right[row_ + p * kRows][column_] = widen(fetched_right_[p]);
    }
  }

 private:
  struct Column {
    Place into;
    bool is_one;  // of the bias
  };

  __device__ Column column_at(int64_t column) const {
    const int64_t real = gram_.columns - patches_.bias;
    if (column >= real) return {{{kNowhere, 0, 0}, 0}, column == real && patches_.bias};
    const auto channel = static_cast<int32_t>(column / patches_.n);
    Place into = patches_.into(static_cast<int32_t>(column % patches_.n));
    into.offset += static_cast<uint32_t>(channel) * patches_.x_channel;
    return {into, false};
  }

  __device__ void fill(int run) {
    const int64_t first = blockIdx.y * gram_.share + static_cast<int64_t>(run) * kGramRun;
    for (int i = threadIdx.x; i < kGramRun; i += Traits::kThreads) {
      RowPlace place{{{kNowhere, 0, 0}, 0}, 0};
      if (first + i < gram_.rows) {
        place.window = patches_.window(static_cast<int32_t>((first + i) % patches_.positions));
        place.sample = (first + i) / patches_.positions * patches_.x_sample;
      }
      rows_[run % 2][i] = place;
    }
  }

  __device__ T read(const Column& column, const RowPlace& row, bool there) const {
    if (column.is_one) return narrow<T>(there ? 1 : 0);
    return there ? patches_.read(x_ + row.sample, row.window, column.into) : narrow<T>(0);
  }

  const Gram& gram_;
  const Patches& patches_;
  const T* const x_;
  RowPlace (&rows_)[2][kGramRun];
  const int row_;
  const int column_;
  const bool is_diagonal_;
  const Column left_;
  const Column right_;
  T fetched_left_[kPasses];
  T fetched_right_[kPasses];
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLeastBlocks)
    patch_kernel(const __grid_constant__ Gram gram, const __grid_constant__ Patches patches) {
  auto& memory = shared_memory<PatchMemory<Traits>>();
  const int64_t group = blockIdx.x / gram.tiles;
  const TilePlace place = tile_of_triangle(blockIdx.x % gram.tiles);
  ThreadSums<Traits> sums;
  PatchReader<Traits> reader(gram, patches, group, place, memory.rows);
  sum_share<Traits>(gram, reader, memory.gram, sums);
  finish_share<Traits>(gram, group, place, memory.gram, sums);
}

template <class Traits>
void conv_gram(const ConvGram& a, const Patches& patches, const Stream& stream) {
  Gram gram{};
  gram.out = a.out;
  gram.rows = a.samples * patches.positions;
  gram.matrices = a.groups;
  gram.columns = a.columns();
  gram.decay = a.decay;
  gram.gain = a.gain;
  share_rows<Traits>(gram);
  launch_shares<Traits, AddManyTraits<Traits>>(kName, gram, stream, [&](const Gram& filled, dim3 grid) {
    launch(kName, patch_kernel<Traits>, grid, Traits::kThreads, sizeof(PatchMemory<Traits>), stream, filled, patches);
  });
}

}  // namespace

void conv_gram_(const ConvGram& a, const Stream& stream) {
  const DeviceGuard guard(stream);
  if (a.columns() == 0) return;
  Patches patches{};
  fill_geometry(kName, a.depth, a.height, a.width, a.x.position_stride, patches);
  const int64_t size = a.depth.size * a.height.size * a.width.size;
  narrow_size(kName, a.channels * a.x.channel_stride + size * a.x.position_stride, "the size of a group of x");
  patches.x = a.x.data;
  patches.x_sample = a.x.sample_stride;
  patches.x_group = a.channels * a.x.channel_stride;
  patches.x_channel = static_cast<uint32_t>(a.x.channel_stride);
  patches.bias = a.bias;
  for_type(a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_tile<T>(a.columns(), [&](auto traits) { conv_gram<typename decltype(traits)::type>(a, patches, stream); });
  });
}

}  // namespace fisher_kernels::cuda
