#pragma once

// What happened before what, in one launch: by barriers, warps that meet, and fences around atomics.

#include <cstddef>
#include <cstdint>
#include <map>
#include <unordered_map>
#include <vector>

#include "running.h"

namespace fisher_kernels::on_host::trace {

/// One access, as far as its order among others goes, and where in the code it is.
struct Access {
  uint32_t place = 0;  // in the code, see place_of in tracer.h
  uint32_t block = 0;
  uint32_t epoch = 0;  // barriers that its block had passed
  uint32_t clock = 0;  // of its thread: meetings of the warp, and fences
  uint16_t thread = 0;
  bool atomic = false;
};

/// What a block, or a thread of it, knows to have happened in others.
///
/// Of each it is all before a barrier, and what some of its threads did after that one and before a fence.
class Knowledge {
 public:
  bool empty() const { return of_.empty(); }
  void clear() { of_.clear(); }
  void add(const Knowledge& other);
  void add(uint32_t block, uint32_t epoch, uint16_t thread, uint32_t clock);
  bool has(const Access& access) const;

 private:
  struct Past {
    uint32_t epoch = 0;
    std::map<uint16_t, uint32_t> clocks;  // of threads, in that epoch
  };

  void add(uint32_t block, const Past& past);

  std::map<uint32_t, Past> of_;  // by block
};

/// The clocks of the running block and of atomics. Blocks run one after the other.
///
/// Within a block, a barrier orders everything, and __syncwarp the lanes that meet; shuffles and votes order nothing, as
/// CUDA says. Between blocks, what a thread sees before __threadfence is handed on by the atomics that follow it, its own
/// and those behind the next barrier; who comes to the same address later knows it after a fence of its own.
class Clocks {
 public:
  void begin_launch();
  void begin_block(uint32_t block);
  void meet_block();
  void meet_warp(int first, uint32_t mask);
  void fence(int thread);
  void atomic(int thread, uintptr_t address);

  /// What `thread` does now.
  Access now(int thread, uint32_t place, bool atomic) const;

  /// Whether it happened before what `thread` does now.
  bool is_before(const Access& access, int thread) const;

 private:
  struct Thread {
    uint32_t seen[kWarpSize];  // clocks of the lanes of its warp; its own is one of them
    Knowledge found;           // by atomics, to be known after a fence
    Knowledge known;
    Knowledge fenced;  // what its atomics hand on
  };

  Thread& of(int thread);

  std::vector<Thread> threads_ = std::vector<Thread>(1024);
  std::vector<int> touched_;         // threads with knowledge of their own
  Knowledge found_, known_, fenced_;  // of all threads of the block: from before the last barrier
  std::unordered_map<uintptr_t, Knowledge> atomics_;
  uint32_t block_ = 0;
  uint32_t epoch_ = 0;
};

}  // namespace fisher_kernels::on_host::trace
