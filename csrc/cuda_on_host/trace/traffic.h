#pragma once

// What the accesses of a launch cost: those of a warp that come from one place in the code for the same time are one
// request, of 32-byte sectors in memory of the device, of wavefronts in shared memory.

#include <cstdint>
#include <map>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace fisher_kernels::on_host::trace {

/// A place in the code and what is done there: whether in shared memory, and whether it is written. Asynchronous copies
/// do two things.
using Deed = std::tuple<uint32_t, bool, bool>;

/// Of one of these.
struct Traffic {
  uint64_t requests = 0;
  uint64_t bytes = 0;   // that the lanes asked for
  uint64_t units = 0;   // sectors, or wavefronts
  uint64_t least = 0;   // that hold these bytes: sectors of distinct bytes, or wavefronts without conflicts
};

class Traffics {
 public:
  void begin_launch();

  /// The requests of the block that ran before are complete.
  void end_block();

  void add(uint32_t place, int thread, uintptr_t address, int bytes, bool shared, bool write);

  const std::map<Deed, Traffic>& by_deed() const { return by_deed_; }

  /// Sectors of the device's memory that the launch has read or written, each counted once.
  uint64_t distinct(bool write) const { return sectors_[write].size(); }

 private:
  struct Part {  // of a request: what one lane asks for
    uint32_t place;
    uint32_t turn;  // how often the thread had done it
    uint16_t thread;
    uint16_t bytes;
    uintptr_t address;
    bool shared;
    bool write;

    Deed deed() const { return {place, shared, write}; }
  };

  void join();
  void count(const Part* first, const Part* last);

  std::vector<Part> parts_;  // of the block
  std::map<Deed, Traffic> by_deed_;
  std::unordered_set<uintptr_t> sectors_[2];
};

}  // namespace fisher_kernels::on_host::trace
