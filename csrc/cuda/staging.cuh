#pragma once

#include "launch.cuh"
#include "types.cuh"

// Runs of consecutive elements on their way through shared memory. Memory of the device is touched 16 bytes a thread,
// neighbours next to each other, and after that the elements are there in any order.
namespace fisher_kernels::cuda {

/// How a run lies in shared memory: in rows, and behind each row 16 bytes more if rows would else begin in too few
/// banks. A row of an odd number of 16 bytes needs none.
template <class A>
struct Rows {
  static constexpr int kVector = kVectorBytes / sizeof(A);

  int32_t length;
  int32_t pad;
  uint32_t inverse;  // ceil(2^32 / length): quotients of what is below 2^32 / length come out exact

  explicit Rows(int64_t length_)
      : length(static_cast<int32_t>(length_)),
        pad(length > 0 && length % (2 * kVector) == 0 ? kVector : 0),
        inverse(pad == 0 ? 0 : 0xffffffffu / static_cast<uint32_t>(length) + 1) {}

  /// Elements of shared memory that so many whole rows need, wherever the run begins.
  size_t room(int64_t count) const {
    return static_cast<size_t>(count * (length + pad) + 2 * kVector) / kVector * kVector;
  }

  __device__ int pitch() const { return length + pad; }

  __device__ int at(int element) const {
    return element + pad * static_cast<int>(__umulhi(static_cast<uint32_t>(element), inverse));
  }
};

/// A run in shared memory, which `kThreads` threads move. All of them call each function.
template <class A, int kThreads>
class Staged {
 public:
  static constexpr int kVector = Rows<A>::kVector;

  /// For a run that comes from `from`, in room that begins at a multiple of 16 bytes. Without pads it gets the place
  /// within 16 bytes that it has there, so that vectors of both coincide.
  __device__ Staged(A* room, const A* from, const Rows<A>& rows)
      : skew_(rows.pad == 0 ? misalignment(from) : 0), origin_(room + skew_), rows_(rows) {}

  /// Elements of one row.
  __device__ A* row(int index) const { return origin_ + index * rows_.pitch(); }

  __device__ int pitch() const { return rows_.pitch(); }

  /// Whether rows of a whole number of vectors are aligned as those.
  __device__ bool has_vectors() const { return skew_ == 0 && rows_.length % kVector == 0; }

  /// Calls look(pack, first) for all that is read, with the number of the pack's first element in the run.
  template <class Look>
  __device__ void load(const A* from, int count, Look look) const {
    const int head = scalars_before(from, count), vectors = (count - head) / kVector;
#pragma unroll 1
    for (int e = threadIdx.x; e < head; e += kThreads) load_one(from, e, look);
    for (int v = threadIdx.x; v < vectors; v += kBatch * kThreads) {
      Pack<A, kVector> packs[kBatch];  // under way at once
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int element = head + (v + i * kThreads) * kVector;
        if (v + i * kThreads < vectors) packs[i] = load_pack<kVector>(from + element);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int element = head + (v + i * kThreads) * kVector;
        if (v + i * kThreads >= vectors) continue;
        look(packs[i], element);
        store_pack(origin_ + rows_.at(element), packs[i]);
      }
    }
#pragma unroll 1
    for (int e = head + vectors * kVector + threadIdx.x; e < count; e += kThreads) load_one(from, e, look);
  }

  __device__ void store(A* to, int count) const {
    const int head = scalars_before(to, count), vectors = (count - head) / kVector;
#pragma unroll 1
    for (int e = threadIdx.x; e < head; e += kThreads) to[e] = origin_[rows_.at(e)];
#pragma unroll 4
    for (int v = threadIdx.x; v < vectors; v += kThreads) {
      const int element = head + v * kVector;
      store_pack(to + element, load_pack<kVector>(origin_ + rows_.at(element)));
    }
#pragma unroll 1
    for (int e = head + vectors * kVector + threadIdx.x; e < count; e += kThreads) to[e] = origin_[rows_.at(e)];
  }

  /// Those elements alone that are wanted.
  template <class Wanted>
  __device__ void store_some(A* to, int count, Wanted wanted) const {
    for (int e = threadIdx.x; e < count; e += kThreads) {
      if (wanted(e)) to[e] = origin_[rows_.at(e)];
    }
  }

 private:
  static constexpr int kBatch = 4;

  static __device__ int misalignment(const A* pointer) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(A) % kVector);
  }

  /// Elements before the first vector: all, where those of the run are not aligned when those of shared memory are.
  __device__ int scalars_before(const A* pointer, int count) const {
    if (misalignment(pointer) != skew_) return count;
    const int head = (kVector - skew_) % kVector;
    return head < count ? head : count;
  }

  template <class Look>
  __device__ void load_one(const A* from, int element, Look look) const {
    const Pack<A, 1> pack{{from[element]}};
    look(pack, element);
    origin_[rows_.at(element)] = pack.at[0];
  }

  int skew_;
  A* origin_;
  Rows<A> rows_;
};

/// For `Staged::load`, where all is welcome.
struct NoLook {
  template <class Pack>
  __device__ void operator()(const Pack&, int) const {}
};

}  // namespace fisher_kernels::cuda
