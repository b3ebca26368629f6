#pragma once

#include <cstdint>
#include <memory>

#include "launch.cuh"

// Lists of tensors as kernels see them: tables of addresses and sizes, passed as kernel parameters, so that hundreds of
// tensors are one launch, nothing is copied to the device first, and CUDA graphs can keep them.
namespace fisher_kernels::cuda {

constexpr int kChunk = 8192;                // elements of a tensor that one block works on
constexpr size_t kMostParameters = 32764;   // bytes that a kernel takes, since CUDA 12.1

/// Tensors for one launch, with what they all share. Block b works on chunk `b - start[i]` of tensor i.
template <class Entry_, class Shared_>
struct Table {
  using Entry = Entry_;
  using Shared = Shared_;
  static constexpr int kCapacity =
      static_cast<int>((kMostParameters - sizeof(Shared) - 16) / (sizeof(Entry) + sizeof(uint32_t)));

  Shared shared;
  Entry entries[kCapacity];
  uint32_t start[kCapacity + 1];  // the first block of each tensor, then how many there are
  int32_t count;

  /// The tensor that a block works on.
  __device__ int tensor_of(uint32_t block) const {
    int first = 0, last = count - 1;
    while (first < last) {
      const int middle = (first + last + 1) / 2;
      if (start[middle] <= block) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    return first;
  }
};

/// Fills tables and launches them when they are full, and at the end.
template <class Table>
class TableWriter {
 public:
  using Kernel = void (*)(Table);

  TableWriter(const char* name, Kernel kernel, int threads, size_t shared_bytes, const Stream& stream,
              const typename Table::Shared& shared)
      : name_(name), kernel_(kernel), threads_(threads), shared_bytes_(shared_bytes), stream_(stream),
        table_(new Table) {
    static_assert(sizeof(Table) <= kMostParameters);
    table_->shared = shared;
    table_->count = 0;
    table_->start[0] = 0;
  }

  /// A tensor for so many blocks; those without elements have none.
  void add(const typename Table::Entry& entry, int64_t blocks) {
    constexpr int64_t kMostBlocks = 0x7fffffff;
    if (blocks == 0) return;
    if (blocks > kMostBlocks) throw std::runtime_error(std::string(name_) + ": a tensor has too many elements");
    if (table_->count == Table::kCapacity || table_->start[table_->count] + blocks > kMostBlocks) flush();
    table_->entries[table_->count] = entry;
    table_->start[table_->count + 1] = table_->start[table_->count] + static_cast<uint32_t>(blocks);
    ++table_->count;
  }

  void flush() {
    launch(name_, kernel_, table_->start[table_->count], threads_, shared_bytes_, stream_, *table_);
    table_->count = 0;
  }

 private:
  const char* name_;
  Kernel kernel_;
  int threads_;
  size_t shared_bytes_;
  const Stream& stream_;
  std::unique_ptr<Table> table_;
};

inline int64_t chunks(int64_t size) { return divide_up<int64_t>(size, kChunk); }

}  // namespace fisher_kernels::cuda
