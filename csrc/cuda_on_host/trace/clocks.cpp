#include "clocks.h"

#include <algorithm>
#include <cstring>

namespace fisher_kernels::on_host::trace {

void Knowledge::add(uint32_t block, const Past& past) {
  Past& own = of_[block];
  if (past.epoch < own.epoch) return;
  if (past.epoch > own.epoch) {
    own = past;
    return;
  }
  for (const auto& [thread, clock] : past.clocks) {
    uint32_t& had = own.clocks[thread];
    had = std::max(had, clock);
  }
}

void Knowledge::add(const Knowledge& other) {
  for (const auto& [block, past] : other.of_) add(block, past);
}

void Knowledge::add(uint32_t block, uint32_t epoch, uint16_t thread, uint32_t clock) {
  add(block, {epoch, {{thread, clock}}});
}

bool Knowledge::has(const Access& access) const {
  const auto found = of_.find(access.block);
  if (found == of_.end() || access.epoch > found->second.epoch) return false;
  if (access.epoch < found->second.epoch) return true;
  const auto clock = found->second.clocks.find(access.thread);
  return clock != found->second.clocks.end() && access.clock < clock->second;
}

void Clocks::begin_launch() { atomics_.clear(); }

void Clocks::begin_block(uint32_t block) {
  block_ = block;
  epoch_ = 0;
  for (Thread& thread : threads_) std::memset(thread.seen, 0, sizeof(thread.seen));
  for (const int number : touched_) {
    Thread& thread = threads_[number];
    thread.found.clear();
    thread.known.clear();
    thread.fenced.clear();
  }
  touched_.clear();
  found_.clear();
  known_.clear();
  fenced_.clear();
}

void Clocks::meet_block() {
  ++epoch_;
  for (const int number : touched_) {
    found_.add(threads_[number].found);
    known_.add(threads_[number].known);
    fenced_.add(threads_[number].fenced);
  }
}

void Clocks::meet_warp(int first, uint32_t mask) {
  uint32_t latest[kWarpSize] = {};
  Knowledge found, known, fenced;
  bool any = false;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& thread = threads_[first + lane];
    ++thread.seen[lane];
    for (int i = 0; i < kWarpSize; ++i) latest[i] = std::max(latest[i], thread.seen[i]);
    if (thread.found.empty() && thread.known.empty() && thread.fenced.empty()) continue;
    any = true;
    found.add(thread.found);
    known.add(thread.known);
    fenced.add(thread.fenced);
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    std::copy_n(latest, kWarpSize, threads_[first + lane].seen);
    if (!any) continue;
    Thread& thread = of(first + lane);
    thread.found.add(found);
    thread.known.add(known);
    thread.fenced.add(fenced);
  }
}

void Clocks::fence(int number) {
  Thread& thread = of(number);
  thread.known.add(thread.found);
  thread.known.add(found_);
  const uint32_t clock = ++thread.seen[number % kWarpSize];
  thread.fenced.add(known_);
  thread.fenced.add(thread.known);
  thread.fenced.add(block_, epoch_, static_cast<uint16_t>(number), clock);
}

void Clocks::atomic(int number, uintptr_t address) {
  Thread& thread = of(number);
  Knowledge& there = atomics_[address];
  thread.found.add(there);
  there.add(thread.fenced);
  there.add(fenced_);
}

Access Clocks::now(int thread, uint32_t place, bool atomic) const {
  return {place, block_, epoch_, threads_[thread].seen[thread % kWarpSize], static_cast<uint16_t>(thread), atomic};
}

bool Clocks::is_before(const Access& access, int thread) const {
  if (access.block != block_) return known_.has(access) || threads_[thread].known.has(access);
  if (access.thread == thread || access.epoch < epoch_) return true;
  return access.thread / kWarpSize == thread / kWarpSize &&
         threads_[thread].seen[access.thread % kWarpSize] > access.clock;
}

/// The thread, which will know something: it is noted.
Clocks::Thread& Clocks::of(int number) {
  Thread& thread = threads_[number];
  if (thread.found.empty() && thread.known.empty() && thread.fenced.empty()) touched_.push_back(number);
  return thread;
}

}  // namespace fisher_kernels::on_host::trace
