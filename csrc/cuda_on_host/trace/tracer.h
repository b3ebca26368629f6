#pragma once

// Gathers what a traced launch does, and writes what was found.

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "clocks.h"
#include "shadow.h"
#include "trace.h"
#include "traffic.h"

namespace fisher_kernels::on_host::trace {

/// The one tracer of the module. Only threads of the launch that it follows call it.
class Tracer {
 public:
  static Tracer& here();

  void begin_launch(const Launch& launch);
  void end_launch();
  void begin_block(int64_t block);
  void meet_block() { clocks_.meet_block(); }
  void meet_warp(int first, uint32_t mask) { clocks_.meet_warp(first, mask); }

  /// An access of the running CUDA thread, in the code at `place`. Those to its stack, to its parameters and to what the
  /// stand-in keeps are none of the kernel's.
  void access(const void* place, const volatile void* address, size_t bytes, Kind kind);
  void fence();

 private:
  struct Finding {
    uint64_t count = 0;
    std::string first;  // an example
  };

  Tracer();

  uint32_t place_of(const void* place) const;
  std::string describe(Wrong wrong, bool shared, uintptr_t address, Kind kind, const Access& now,
                       const Access& other) const;
  void write() const;

  std::mutex one_;  // launch at a time
  std::string path_;
  std::string module_;
  uintptr_t base_ = 0;
  const Launch* launch_ = nullptr;
  Clocks clocks_;
  Shadow shadow_{clocks_};
  bool counts_ = false;  // traffic too: FISHER_KERNELS_HOST_TRAFFIC asks for it
  Traffics traffic_;
  std::map<std::tuple<Wrong, bool, uint32_t, uint32_t>, Finding> findings_;  // what, shared or not, two places
};

}  // namespace fisher_kernels::on_host::trace
