#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "integers.h"

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// A strided array with as few dimensions as describe it.
class Walk {
 public:
  explicit Walk(const StridedArray& array) {
    for (int d = 0; d < array.dims; ++d) {
      const int64_t size = array.sizes[d], stride = array.strides[d];
      if (size == 1) continue;
      if (dims_ > 0 && strides_[dims_ - 1] == size * stride) {
        sizes_[dims_ - 1] *= size;
        strides_[dims_ - 1] = stride;
      } else {
        sizes_[dims_] = size;
        strides_[dims_++] = stride;
      }
    }
  }

  /// Calls visit(i, offset, run, stride) for runs of evenly spaced elements: elements first + i to first + i + run in
  /// row-major order, the first of which lies at `offset`.
  template <class Visit>
  void visit(int64_t first, int64_t count, const Visit& visit) const {
    if (dims_ == 0) return visit(int64_t{0}, int64_t{0}, count, int64_t{1});
    int64_t index[kMaxDims];
    int64_t offset = 0;
    for (int d = dims_ - 1; d >= 0; --d) {
      index[d] = first % sizes_[d];
      first /= sizes_[d];
      offset += index[d] * strides_[d];
    }
    const int inner = dims_ - 1;
    for (int64_t i = 0; i < count;) {
      const int64_t run = smaller(sizes_[inner] - index[inner], count - i);
      visit(i, offset, run, strides_[inner]);
      i += run;
      offset += run * strides_[inner];
      index[inner] += run;
      for (int d = inner; d > 0 && index[d] == sizes_[d]; --d) {
        offset += strides_[d - 1] - sizes_[d] * strides_[d];
        index[d] = 0;
        ++index[d - 1];
      }
    }
  }

  /// How many arrays of `size` elements lie side by side, if that is what fills the memory: elements k of so many
  /// arrays that follow one another, then elements k + 1 of the same. Else 0.
  int64_t side_by_side(int64_t size) const {
    const int inner = dims_ - 1, outer = dims_ - 2;
    if (outer < 0 || outer > 1) return 0;
    const int64_t count = sizes_[outer];
    const bool filled = strides_[outer] == 1 && sizes_[inner] == size && strides_[inner] == count &&
                        (outer == 0 || strides_[0] == count * size);
    return filled ? count : 0;
  }

 private:
  static constexpr int kMaxDims = 64;  // as many as torch has

  int dims_ = 0;
  int64_t sizes_[kMaxDims];
  int64_t strides_[kMaxDims];
};

/// Runs from this length on are copied by memcpy; shorter ones cost less in a loop than a call does.
constexpr int64_t kCopied = 32;

template <class T>
inline void copy_run(const T* from, int64_t run, T* to) {
  if (run >= kCopied) {
    std::memcpy(to, from, run * sizeof(T));
  } else {
    for (int64_t k = 0; k < run; ++k) to[k] = from[k];
  }
}

template <class T>
void gather(const T* data, const Walk& walk, int64_t first, int64_t count, T* out) {
  walk.visit(first, count, [&](int64_t i, int64_t offset, int64_t run, int64_t stride) {
    if (stride == 1) {  // rows of a matrix with longer rows: a copy
      copy_run(data + offset, run, out + i);
    } else {
      for (int64_t k = 0; k < run; ++k) out[i + k] = data[offset + k * stride];
    }
  });
}

template <class T>
void scatter(const T* in, int64_t first, int64_t count, const Walk& walk, T* data) {
  walk.visit(first, count, [&](int64_t i, int64_t offset, int64_t run, int64_t stride) {
    if (stride == 1) {
      copy_run(in + i, run, data + offset);
    } else {
      for (int64_t k = 0; k < run; ++k) data[offset + k * stride] = in[i + k];
    }
  });
}

/// The elements of an array in row-major order, at most kMost at a time: where they lie, or in a buffer.
template <class T, int64_t kMost>
class Chunks {
 public:
  explicit Chunks(const StridedArray& array)
      : data_(static_cast<T*>(array.data)), in_place_(array.contiguous), walk_(array) {}

  T* read(int64_t first, int64_t count) {
    if (in_place_) return data_ + first;
    gather(data_, walk_, first, count, buffer_);
    return buffer_;
  }

  /// Puts back what was read last and changed.
  void write(int64_t first, int64_t count) {
    if (!in_place_) scatter(buffer_, first, count, walk_, data_);
  }

 private:
  T* const data_;
  const bool in_place_;
  const Walk walk_;
  alignas(64) T buffer_[kMost];
};

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
