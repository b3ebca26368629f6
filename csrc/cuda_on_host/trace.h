#pragma once

// What a traced build (trace/) sees of a launch besides the accesses of its threads. Elsewhere none of it is there.

#include <cstdint>

#include "launch.h"
#include "running.h"

namespace fisher_kernels::on_host::trace {

#ifdef FISHER_KERNELS_HOST_TRACE

inline constexpr bool kOn = true;

/// From one launch to its end. Another thread of the processor that launches a kernel waits.
class Launching {
 public:
  explicit Launching(const Launch& launch);
  ~Launching();
  Launching(const Launching&) = delete;
  Launching& operator=(const Launching&) = delete;
};

/// A block begins: its number in the grid.
void begin_block(int64_t block);

/// All threads of the block have come to a barrier.
void meet_block();

/// The lanes of a warp in the mask have met, `first` being the number of the warp's first thread.
void meet_warp(Meeting meeting, int first, uint32_t mask);

/// The running thread begins an asynchronous copy, in the code at `place`; one that it began has arrived.
void begin_copy(const void* place, void* to, const void* from, int bytes);
void end_copy(const void* place, void* to, int bytes);

#else

inline constexpr bool kOn = false;

struct Launching {
  explicit Launching(const Launch&) {}
};
inline void begin_block(int64_t) {}
inline void meet_block() {}
inline void meet_warp(Meeting, int, uint32_t) {}
inline void begin_copy(const void*, void*, const void*, int) {}
inline void end_copy(const void*, void*, int) {}

#endif

}  // namespace fisher_kernels::on_host::trace
