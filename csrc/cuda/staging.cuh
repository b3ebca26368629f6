#pragma once

#include "async_copy.cuh"
#include "launch.cuh"
#include "types.cuh"

// Runs of consecutive elements on their way through shared memory. Memory of the device is touched 16 bytes a thread,
// neighbours next to each other, and after that the elements are there in any order. All of a run is under way at once,
// past the registers: a kernel begins all its copies before it waits for any.
namespace fisher_kernels::cuda {

/// Elements by which an address lies past a multiple of 16 bytes.
template <class A>
__device__ inline int misalignment(const A* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(A) % (kVectorBytes / sizeof(A)));
}

/// Elements of a run before its first 16 bytes that are aligned.
template <class A>
__device__ inline int elements_before_vectors(const A* run, int count) {
  constexpr int N = kVectorBytes / sizeof(A);
  const int head = (N - misalignment(run)) % N;
  return head < count ? head : count;
}

/// Calls vector(e) for the first element of each `kVector` of a run, and single(e) for the `head` elements before those
/// and for what is left behind them. Threads take turns, always the same ones.
template <int kThreads, int kVector, class Vector, class Single>
__device__ inline void for_run(int head, int count, const Vector& vector, const Single& single) {
  const int thread = threadIdx.x, vectors = (count - head) / kVector;
#pragma unroll 4
  for (int v = thread; v < vectors; v += kThreads) vector(head + v * kVector);
#pragma unroll 1
  for (int e = thread; e < head; e += kThreads) single(e);
#pragma unroll 1
  for (int e = head + vectors * kVector + thread; e < count; e += kThreads) single(e);
}

/// Begins to copy an element to shared memory, or copies it where that cannot be begun.
template <class A>
__device__ inline void begin_to_copy(A* to_shared, const A* from) {
  if constexpr (sizeof(A) < 4) {
    *to_shared = *from;
  } else {
    copy_async<sizeof(A)>(to_shared, from);
  }
}

/// Begins to copy a run to shared memory that is misaligned as the run is. All `kThreads` threads call it, and
/// `wait_for_all_copies` later.
template <int kThreads, class A>
__device__ inline void begin_to_copy_run(A* to_shared, const A* from, int count) {
  for_run<kThreads, kVectorBytes / sizeof(A)>(
      elements_before_vectors(from, count), count, [=](int e) { copy_async<kVectorBytes>(to_shared + e, from + e); },
      [=](int e) { begin_to_copy(to_shared + e, from + e); });
}

/// Waits for what this thread has begun; other threads see it after their next barrier.
__device__ inline void wait_for_all_copies() {
  end_copies();
  wait_for_copies<0>();
}

/// Moves 16 bytes as bits: of what holds numbers the compiler makes accesses of single ones.
template <class A>
__device__ inline void move_vector(A* to, const A* from) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

/// Writes a run from shared memory that is misaligned as the run is.
template <int kThreads, class A>
__device__ inline void store_run(A* to, const A* from_shared, int count) {
  for_run<kThreads, kVectorBytes / sizeof(A)>(
      elements_before_vectors(to, count), count, [=](int e) { move_vector(to + e, from_shared + e); },
      [=](int e) { to[e] = from_shared[e]; });
}

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

  /// Begins to copy the run. `wait_for_all_copies` comes before what follows.
  __device__ void begin(const A* from, int count) const {
    A* const to = origin_;
    if (rows_.pad == 0) return begin_to_copy_run<kThreads>(to, from, count);
    const Rows<A>& rows = rows_;
    for_run<kThreads, kVector>(
        scalars_before(from, count), count, [=](int e) { copy_async<kVectorBytes>(to + rows.at(e), from + e); },
        [=](int e) { begin_to_copy(to + rows.at(e), from + e); });
  }

  /// Calls look(pack, first) for what this thread has copied, with the number of the pack's first element in the run.
  template <class Look>
  __device__ void look_through(const A* from, int count, Look look) const {
    for_run<kThreads, kVector>(
        scalars_before(from, count), count,
        [&](int e) { look(load_pack<kVector>(origin_ + rows_.at(e)), e); },
        [&](int e) { look(load_pack<1>(origin_ + rows_.at(e)), e); });
  }

  __device__ void store(A* to, int count) const {
    const A* const from = origin_;
    if (rows_.pad == 0 && misalignment(to) == skew_) return store_run<kThreads>(to, from, count);
    const Rows<A>& rows = rows_;
    for_run<kThreads, kVector>(
        scalars_before(to, count), count, [=](int e) { move_vector(to + e, from + rows.at(e)); },
        [=](int e) { to[e] = from[rows.at(e)]; });
  }

  /// Those elements alone that are wanted.
  template <class Wanted>
  __device__ void store_some(A* to, int count, Wanted wanted) const {
    for (int e = threadIdx.x; e < count; e += kThreads) {
      if (wanted(e)) to[e] = origin_[rows_.at(e)];
    }
  }

 private:
  /// Elements before the first vector: all, where those of the run are not aligned when those of shared memory are.
  __device__ int scalars_before(const A* pointer, int count) const {
    return misalignment(pointer) == skew_ ? elements_before_vectors(pointer, count) : count;
  }

  int skew_;
  A* origin_;
  Rows<A> rows_;
};

}  // namespace fisher_kernels::cuda
