#pragma once

#include <cstdint>
#include <new>

namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

/// Uninitialised memory for `size` numbers, freed with the object.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T)))) {}
  ~Scratch() { ::operator delete(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
