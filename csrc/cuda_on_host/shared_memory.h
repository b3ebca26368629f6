#pragma once

// The dynamic shared memory of one block.

#include <cstddef>
#include <memory>
#include <optional>

namespace fisher_kernels::on_host {

/// Bytes that a block may have: 227 KB, as compute capability 9.0 has.
inline constexpr size_t kMaxSharedBytes = 227 * 1024;

class SharedMemory {
 public:
  SharedMemory();

  /// Fills `bytes` bytes with NaN, for a block that is about to run, and guards what lies behind them.
  void open(size_t bytes);

  /// Takes the guard away. Returns the number of a byte behind the memory that was written, if one was; where
  /// AddressSanitizer guards it, the program has stopped already.
  std::optional<size_t> close();

  unsigned char* data() const { return data_; }

 private:
  std::unique_ptr<unsigned char[]> allocation_;
  unsigned char* data_;  // aligned
  size_t bytes_ = 0;
};

}  // namespace fisher_kernels::on_host
