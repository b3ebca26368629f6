#include "shared_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fisher_kernels::on_host {

namespace {

constexpr size_t kAlignment = 128;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kNan = 0xff;  // in every byte: NaN as float, double, half and bfloat16
constexpr unsigned char kGuard = 0xa5;

}  // namespace

SharedMemory::SharedMemory() : allocation_(new unsigned char[kAlignment + kMaxSharedBytes + kGuardBytes]) {
  const auto address = reinterpret_cast<uintptr_t>(allocation_.get());
  data_ = allocation_.get() + (kAlignment - address % kAlignment) % kAlignment;
}

#ifdef __SANITIZE_ADDRESS__

void SharedMemory::open(size_t bytes) {
  bytes_ = bytes;
  std::memset(data_, kNan, bytes_);
  __asan_poison_memory_region(data_ + bytes_, kMaxSharedBytes + kGuardBytes - bytes_);
}

std::optional<size_t> SharedMemory::close() {
  __asan_unpoison_memory_region(data_, kMaxSharedBytes + kGuardBytes);
  return std::nullopt;
}

#else

void SharedMemory::open(size_t bytes) {
  bytes_ = bytes;
  std::memset(data_, kNan, bytes_);
  std::memset(data_ + bytes_, kGuard, kGuardBytes);
}

std::optional<size_t> SharedMemory::close() {
  const unsigned char* guard = data_ + bytes_;
  const auto* written = std::find_if(guard, guard + kGuardBytes, [](unsigned char byte) { return byte != kGuard; });
  if (written == guard + kGuardBytes) return std::nullopt;
  return written - data_;
}

#endif

}  // namespace fisher_kernels::on_host
