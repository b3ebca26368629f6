#pragma once

#include <algorithm>
#include <vector>

#include "step.cuh"

// What a mini-block Fisher step hands its kernels: its coefficients, its parameters as entries of tables, the way that
// each of them takes, and the memory that is needed beside them.
namespace fisher_kernels::cuda::mbf {

constexpr const char* kName = "mbf_step_";
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kElements = 512;  // of a tile: whole blocks, as many as fit
constexpr int kNumbers = 5120;  // of an inverse in a tile: those of 56 blocks of 9 x 9
static_assert(kElements % kThreads == 0);

/// Of a reciprocal of n by which elements of a tile are divided, n being at most kElements there.
constexpr int kReciprocalBits = 20;
static_assert(kElements * kElements <= 1 << kReciprocalBits, "quotients come out exact");
static_assert((int64_t{kElements} << kReciprocalBits) / 2 + kElements < int64_t{1} << 32, "n is 2 at least");

constexpr int kSlabRows = 16;  // of a block that is larger than a tile: as many sums a thread has in registers

/// The coefficients of a step, in the type that it is computed in.
template <class A>
struct Rates {
  A gradient_scale;
  A momentum;
  A weight_decay;  // coupled form
  A step_size;     // lr, shortened in the second pass
  A shrinkage;     // decoupled form: lr * weight_decay
  bool off;        // nothing is to be done
};

/// Those of a parameter are found once, on the device, since many GPUs are slow at divisions in float64.
struct alignas(kVectorBytes) Coefficients {
  Rates<float> in_float;
  Rates<double> in_double;

  template <class A>
  __device__ const Rates<A>& in() const {
    if constexpr (std::is_same_v<A, double>) {
      return in_double;
    } else {
      return in_float;
    }
  }
};

/// What the bounds of a step are about, of a tile.
struct Sums {
  double change;  // d m, or d g
  double square;  // d^2
  double weight;  // w^2, without what is not finite
};

/// The same of a parameter, with lr^2 in the first two.
struct Total : Sums {
  int64_t elements;
  int64_t layer;
};

/// What all tables have: of which sums there is need.
struct Shared {
  bool along_gradient;  // change is d g
  bool caps;            // square and weight
};

/// A parameter as [rows, columns], each row in blocks of n x n.
struct Entry : StepArrays {
  const void* inverse;  // null where directions came from elsewhere
  void* directions;     // null where none are kept
  void* moments;        // new ones of slabs
  void* parts;          // of slabs of packed blocks, what their rows give as columns
  Sums* sums;           // one for each tile, or null where the step waits for none
  Coefficients* coefficients;
  int64_t* skipped;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;  // of directions
  int64_t block_stride;
  int32_t n;
  int32_t blocks_in_tile;
  bool packed;
  bool short_moment;  // in bfloat16, and that of the bias as well
  uint32_t reciprocal;  // of n, as a multiple of 2^-kReciprocalBits, rounded up

  /// The block of an element of a tile of whole blocks: exact, for a multiple of 1 / n is at least 1 / n below the next
  /// whole number, and the reciprocal too large by less than 2^-kReciprocalBits.
  __device__ int block_of(int at) const {
    return static_cast<int>(static_cast<uint32_t>(at) * reciprocal >> kReciprocalBits);
  }

  template <class A>
  __device__ const Rates<A>& rates() const {
    return coefficients->in<A>();
  }

  /// Numbers of a block of the inverse.
  __host__ __device__ int64_t numbers() const {
    const int64_t all = static_cast<int64_t>(n) * n;
    return packed ? (all + n) / 2 : all;
  }

  __host__ __device__ int64_t blocks_in_row() const { return divide_up<int64_t>(columns, n); }
};

/// One of any strides, or with a bias as its last column.
struct JoinedEntry : Entry {
  void* bias_parameter;
  const void* bias_gradient;
  void* bias_moment;
  bool biased;
  bool strided;
  bool bias_strided;
  Geometry geometry;
  Geometry bias_geometry;
};

enum class Way : uint8_t { diagonal, blocks, slabs, along };

/// A parameter that has elements, and how it goes through the kernels.
struct Item {
  const MbfParameter* parameter;
  JoinedEntry entry;
  DType dtype;
  DType moment_dtype;
  DType inverse_dtype;
  Way way = Way::along;
  bool joined = false;
  bool flat = false;        // directions lie as the parameter does
  int64_t directions = -1;  // places in the scratch, or -1
  int64_t moments = -1;
  int64_t parts = -1;
  int64_t sums = -1;

  bool is(DType of, DType inverse) const { return dtype == of && inverse_dtype == inverse; }
};

inline bool is_strided(const MbfArrays& arrays) {
  return !(arrays.parameter.contiguous && arrays.gradient.contiguous && arrays.moment.contiguous);
}

inline Geometry geometry_of(const MbfArrays& arrays) {
  return make_geometry(kName, {&arrays.parameter, &arrays.gradient, &arrays.moment}, true);
}

inline JoinedEntry make_entry(const MbfParameter& p) {
  JoinedEntry entry{};
  const bool is_bias = p.biased && p.columns == 1;  // and nothing beside it
  const MbfArrays& arrays = is_bias ? p.bias : p.weight;
  entry.parameter = arrays.parameter.data;
  entry.gradient = arrays.gradient.data;
  entry.moment = arrays.moment.data;
  entry.size = p.rows * p.columns;
  entry.inverse = p.inverse;
  entry.directions = p.directions;
  entry.skipped = p.skipped;
  entry.rows = p.rows;
  entry.columns = p.columns;
  entry.row_stride = p.directions == nullptr ? p.columns : p.row_stride;
  entry.block_stride = p.block_stride;
  entry.n = static_cast<int32_t>(p.size);
  entry.packed = p.packed;
  entry.reciprocal = static_cast<uint32_t>(divide_up<int64_t>(1 << kReciprocalBits, std::max<int64_t>(p.size, 1)));
  entry.short_moment = p.moment_dtype == DType::bfloat16;
  entry.strided = is_strided(arrays);
  if (entry.strided) entry.geometry = geometry_of(arrays);
  entry.biased = p.biased && !is_bias;
  if (!entry.biased) return entry;
  entry.bias_parameter = p.bias.parameter.data;
  entry.bias_gradient = p.bias.gradient.data;
  entry.bias_moment = p.bias.moment.data;
  entry.bias_strided = is_strided(p.bias);
  if (entry.bias_strided) entry.bias_geometry = geometry_of(p.bias);
  return entry;
}

inline Way way_of(const Entry& entry) {
  if (entry.inverse == nullptr) return Way::along;
  if (entry.n == 1) return Way::diagonal;
  return entry.numbers() <= kNumbers ? Way::blocks : Way::slabs;
}

inline int64_t slabs_of(const Item& item) { return item.entry.rows * divide_up<int64_t>(item.entry.n, kSlabRows); }

inline int32_t blocks_in_tile(const Entry& entry, Way way) {
  const int64_t by_numbers = way == Way::blocks ? kNumbers / entry.numbers() : kElements;
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(kElements / entry.n, by_numbers));
  return static_cast<int32_t>(most < 16 ? most : most / 8 * 8);  // tiles begin with whole sectors of memory
}

/// Blocks of threads of the kernel that makes the sums.
inline int64_t tiles_of(const Item& item) {
  if (item.way == Way::diagonal) return chunks(item.entry.rows);
  return divide_up<int64_t>(item.entry.rows * item.entry.blocks_in_row(), item.entry.blocks_in_tile);
}

/// All parameters that have elements, and the memory that is needed beside them.
struct Plan {
  std::vector<Item> items;
  int64_t bytes = 0;
  int64_t sums = 0;  // how many there are, after the coefficients and the totals

  /// Whether any item is of a dtype.
  bool has(DType dtype) const {
    return std::any_of(items.begin(), items.end(), [=](const Item& item) { return item.dtype == dtype; });
  }

  explicit Plan(const MbfStep& step) {
    items.reserve(step.count);
    for (int64_t i = 0; i < step.count; ++i) {
      const MbfParameter& p = step.parameters[i];
      if (p.rows * p.columns > 0) add(p, step.waits());
    }
    bytes = count() * (sizeof(Coefficients) + sizeof(Total)) + sums * sizeof(Sums);
    for (Item& item : items) reserve(item, step.waits());
  }

  /// Tells the entries where their memory is.
  void place(char* memory) {
    for (size_t i = 0; i < items.size(); ++i) {
      Item& item = items[i];
      item.entry.coefficients = reinterpret_cast<Coefficients*>(memory) + i;
      if (item.directions >= 0) item.entry.directions = memory + item.directions;
      if (item.moments >= 0) item.entry.moments = memory + item.moments;
      if (item.parts >= 0) item.entry.parts = memory + item.parts;
      if (item.sums >= 0) item.entry.sums = first_sum(memory) + item.sums;
    }
  }

  int64_t count() const { return static_cast<int64_t>(items.size()); }

  Total* totals(char* memory) const { return reinterpret_cast<Total*>(memory + count() * sizeof(Coefficients)); }
  Sums* first_sum(char* memory) const { return reinterpret_cast<Sums*>(totals(memory) + count()); }

 private:
  void add(const MbfParameter& p, bool waits) {
    Item item{};
    item.parameter = &p;
    item.entry = make_entry(p);
    item.dtype = p.dtype;
    item.moment_dtype = p.moment_dtype;
    item.inverse_dtype = p.inverse_dtype;
    Entry& entry = item.entry;
    item.way = way_of(entry);
    item.joined = item.entry.biased || item.entry.strided;
    item.flat = !item.joined && entry.row_stride == p.columns && p.size == p.columns;
    entry.blocks_in_tile = blocks_in_tile(entry, item.way);
    if (waits) {
      item.sums = sums;
      sums += tiles_of(item);
    }
    items.push_back(item);
  }

  void reserve(Item& item, bool waits) {
    const int64_t size = size_of(accumulation_dtype(item.dtype)), columns = item.entry.columns;
    const int64_t all = item.entry.rows * columns * size;
    if (item.way != Way::along && (waits || item.way == Way::slabs)) item.directions = take(all);
    if (item.way != Way::slabs) return;
    item.moments = take(all);
    if (item.entry.packed) item.parts = take(slabs_of(item) * columns * size);
  }

  int64_t take(int64_t count) {
    const int64_t at = divide_up<int64_t>(bytes, kVectorBytes) * kVectorBytes;
    bytes = at + count;
    return at;
  }
};

}  // namespace fisher_kernels::cuda::mbf
