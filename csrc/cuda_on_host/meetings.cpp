// What happens where the threads of a block meet, and what can go wrong there.

#include <algorithm>
#include <cstdio>

#include "block.h"
#include "trace.h"

namespace fisher_kernels::on_host {

namespace {

const char* word(Meeting meeting) {
  switch (meeting) {
    case Meeting::syncthreads: return "__syncthreads";
    case Meeting::syncthreads_count: return "__syncthreads_count";
    case Meeting::syncthreads_and: return "__syncthreads_and";
    case Meeting::syncthreads_or: return "__syncthreads_or";
    case Meeting::syncwarp: return "__syncwarp";
    case Meeting::shuffle: return "__shfl_sync";
    case Meeting::shuffle_up: return "__shfl_up_sync";
    case Meeting::shuffle_down: return "__shfl_down_sync";
    case Meeting::shuffle_xor: return "__shfl_xor_sync";
    case Meeting::ballot: return "__ballot_sync";
    case Meeting::any: return "__any_sync";
    case Meeting::all: return "__all_sync";
    case Meeting::multiply_matrices: return "mma.sync";
    case Meeting::load_matrices: return "ldmatrix";
  }
  return "?";
}

bool is_of_block(Meeting meeting) { return meeting <= Meeting::syncthreads_or; }

void do_together(WarpWork work, const uint64_t (&given)[kWarpSize]) {
  void* lanes[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane] = reinterpret_cast<void*>(given[lane]);
  work(lanes);
}

bool is_shuffle(Meeting meeting) { return meeting >= Meeting::shuffle && meeting <= Meeting::shuffle_xor; }

/// Whether two lanes came for the same.
bool agree(const Arrival& a, const Arrival& b) {
  return a.meeting == b.meeting && a.mask == b.mask && a.bytes == b.bytes && a.work == b.work;
}

std::string hexadecimal(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

uint32_t bit(int lane) { return uint32_t{1} << lane; }

/// The lane whose value `lane` asks for. Beyond its segment of the warp it gets its own.
uint32_t source_of(const Arrival& at, uint32_t lane) {
  const uint32_t first = lane & ~static_cast<uint32_t>(at.width - 1);
  const uint32_t last = first + at.width - 1;
  switch (at.meeting) {
    case Meeting::shuffle: return first | (at.lane & (at.width - 1));
    case Meeting::shuffle_up: return at.lane <= lane - first ? lane - at.lane : lane;
    case Meeting::shuffle_down: return at.lane <= last - lane ? lane + at.lane : lane;
    default: return (lane ^ at.lane) <= last ? lane ^ at.lane : lane;
  }
}

/// What is wrong with what a lane of a warp of `size` threads brings; null if nothing is.
const char* wrong_with(const Arrival& at, int lane, int size) {
  const uint32_t there = size == kWarpSize ? ~uint32_t{0} : bit(size) - 1;
  if ((at.mask & bit(lane)) == 0) return ", which leaves out its own lane";
  if ((at.mask & ~there) != 0) return ", which names lanes beyond the threads of the block";
  if (at.width < 1 || at.width > kWarpSize || (at.width & (at.width - 1)) != 0) {
    return " and a width that is no power of two up to 32";
  }
  return nullptr;
}

}  // namespace

int meet_block(Meeting meeting, bool predicate) {
  return static_cast<int>(active_runner->meet_block({meeting, 0, 0, 0, 0, predicate}));
}

uint64_t meet_warp(const Arrival& arrival) { return active_runner->meet_warp(arrival); }

uint64_t BlockRunner::meet_block(const Arrival& arrival) {
  Thread& self = *current_;
  self.at = arrival;
  self.state = State::waiting;
  ++at_barrier_;
  wait();
  return self.at.value;
}

uint64_t BlockRunner::meet_warp(const Arrival& arrival) {
  Thread& self = *current_;
  Warp& warp = warps_[number(self) / kWarpSize];
  self.at = arrival;
  self.state = State::waiting;
  const int lane = number(self) - warp.first;
  warp.waiting |= bit(lane);
  if (const char* fault = wrong_with(arrival, lane, warp.size)) stop(describe(self) + fault);
  if (is_complete(warp, arrival.mask)) {
    if (const Thread* lost = astray(warp, arrival.mask)) {
      const uint32_t source = source_of(lost->at, number(*lost) - warp.first);
      stop(describe(*lost) + ", which leaves out its source lane " + std::to_string(source));
    }
    exchange(warp, arrival.mask);
  }
  wait();
  return self.at.value;
}

/// Lets all threads of the block pass if all are at the same barrier. Says whether there is anything left to do.
bool BlockRunner::release_block() {
  const int size = static_cast<int>(threads_.size());
  if (ended_ == size) return false;
  const Meeting meeting = threads_[0].at.meeting;
  int holding = 0;
  bool agreed = at_barrier_ == size;
  for (const Thread& thread : threads_) {
    agreed = agreed && thread.at.meeting == meeting;
    holding += thread.at.value != 0;
  }
  if (!agreed) {
    fail(cudaErrorLaunchFailure, stuck());
    return false;
  }
  const int result = meeting == Meeting::syncthreads_and  ? holding == size
                     : meeting == Meeting::syncthreads_or ? holding != 0
                                                          : holding;
  for (Thread& thread : threads_) {
    thread.at.value = result;
    wake(thread);
  }
  at_barrier_ = 0;
  trace::meet_block();
  return true;
}

/// Whether all lanes of the mask wait, and for the same.
bool BlockRunner::is_complete(const Warp& warp, uint32_t mask) const {
  if ((mask & ~warp.waiting) != 0) return false;
  const Arrival& first = threads_[warp.first + __builtin_ctz(mask)].at;
  for (int lane = 0; lane < warp.size; ++lane) {
    if ((mask & bit(lane)) != 0 && !agree(first, threads_[warp.first + lane].at)) return false;
  }
  return true;
}

/// Gives every lane of the mask what it came for and wakes it.
void BlockRunner::exchange(Warp& warp, uint32_t mask) {
  uint64_t given[kWarpSize] = {};
  uint32_t ballot = 0;
  trace::meet_warp(threads_[warp.first + __builtin_ctz(mask)].at.meeting, warp.first, mask);
  for (int lane = 0; lane < warp.size; ++lane) {
    given[lane] = threads_[warp.first + lane].at.value;
    if ((mask & bit(lane)) != 0 && given[lane] != 0) ballot |= bit(lane);
  }
  if (const WarpWork work = threads_[warp.first + __builtin_ctz(mask)].at.work) do_together(work, given);
  for (int lane = 0; lane < warp.size; ++lane) {
    if ((mask & bit(lane)) == 0) continue;
    Thread& thread = threads_[warp.first + lane];
    Arrival& at = thread.at;
    if (is_shuffle(at.meeting)) {
      at.value = given[source_of(at, lane)];
    } else {
      at.value = at.meeting == Meeting::all ? ballot == mask : ballot;
    }
    wake(thread);
  }
  warp.waiting &= ~mask;
}

/// A lane of a complete shuffle that asks for the value of one that takes no part; null if there is none.
const BlockRunner::Thread* BlockRunner::astray(const Warp& warp, uint32_t mask) const {
  for (int lane = 0; lane < warp.size; ++lane) {
    const Thread& thread = threads_[warp.first + lane];
    if ((mask & bit(lane)) == 0 || !is_shuffle(thread.at.meeting)) continue;
    if ((mask & bit(source_of(thread.at, lane))) == 0) return &thread;
  }
  return nullptr;
}

/// Why nothing can go on: a thread that waits, and one for which it waits in vain.
std::string BlockRunner::stuck() const {
  for (const Thread& thread : threads_) {
    if (thread.state != State::waiting || is_of_block(thread.at.meeting)) continue;
    const Warp& warp = warps_[number(thread) / kWarpSize];
    for (int lane = 0; lane < warp.size; ++lane) {
      const Thread& other = threads_[warp.first + lane];
      const bool comes = other.state == State::waiting && agree(other.at, thread.at);
      if ((thread.at.mask & bit(lane)) != 0 && !comes) return describe(thread) + ", " + describe(other);
    }
  }
  // All that wait do so at a barrier of the block.
  const auto waits = [](const Thread& thread) { return thread.state == State::waiting; };
  const Thread& thread = *std::find_if(threads_.begin(), threads_.end(), waits);
  const auto stays_away = [&](const Thread& other) { return !waits(other) || !agree(other.at, thread.at); };
  return describe(thread) + ", " + describe(*std::find_if(threads_.begin(), threads_.end(), stays_away));
}

std::string BlockRunner::describe(const Thread& thread) const {
  if (thread.state == State::ended) return name(thread) + " has ended";
  const std::string place = name(thread) + " waits at " + word(thread.at.meeting);
  return is_of_block(thread.at.meeting) ? place : place + " with mask " + hexadecimal(thread.at.mask);
}

}  // namespace fisher_kernels::on_host
