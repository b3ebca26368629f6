#pragma once

// What was last done to every two bytes of memory that a launch has touched, and what does not go together.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "clocks.h"

namespace fisher_kernels::on_host::trace {

enum class Kind : uint8_t { read, write, atomic, copy_begins, copy_ends };

/// What is wrong with an access.
enum class Wrong : uint8_t {
  nothing,
  race,        // with another, of which one writes, and neither is before the other
  under_way,   // an asynchronous copy to the same place has not been waited for
  unwritten,   // a read of shared memory that the block has not written
};

class Shadow {
 public:
  explicit Shadow(const Clocks& clocks) : clocks_(clocks) {}

  /// Memory of the device is told anew in each launch, shared memory in each block.
  void begin_launch();
  void begin_block() { shared_scope_ = ++scopes_; }

  /// One access of `thread`. If something is wrong with it, `other` is the one that it does not go with.
  Wrong access(uintptr_t address, int bytes, bool shared, Kind kind, const Access& now, Access& other);

 private:
  static constexpr uintptr_t kPageBytes = 4096;
  static constexpr uintptr_t kGrain = 2;  // bytes of the smallest numbers that kernels have

  struct Cell {
    uint32_t scope = 0;  // in which the rest was noted; older is nothing
    uint32_t more = 0;   // reads that are not before `read` nor after it, one more than their number in more_
    bool written = false;
    bool was_read = false;
    bool under_way = false;
    Access write;  // the last one
    Access read;
  };

  using Page = std::vector<Cell>;

  Cell& at(uintptr_t address, bool shared);
  Wrong look(Cell& cell, bool shared, Kind kind, const Access& now, Access& other);
  void add_read(Cell& cell, const Access& now);

  const Clocks& clocks_;
  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t last_number_ = ~uintptr_t{0};
  Page* last_page_ = nullptr;
  std::vector<std::vector<Access>> more_;
  uint32_t scopes_ = 0;
  uint32_t launch_scope_ = 0;
  uint32_t shared_scope_ = 0;
};

}  // namespace fisher_kernels::on_host::trace
