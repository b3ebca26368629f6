#pragma once

#include <cstddef>

namespace fisher_kernels {

/// Where kernels are queued on a GPU.
struct Stream {
  int device;
  void* handle;  // cudaStream_t
};

/// Memory on the device of a stream for as long as the object lives, in the order of the stream: what was queued before
/// the end may still use it. It comes from torch's allocator, so that it costs no call of the driver and is safe while a
/// CUDA graph is captured. Not initialised; as well aligned as tensors are.
class Scratch {
 public:
  Scratch(const Stream& stream, size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  void* owner_ = nullptr;
};

}  // namespace fisher_kernels
