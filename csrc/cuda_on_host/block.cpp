#include "block.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "trace.h"

namespace fisher_kernels::on_host {

__thread Running running;
__thread BlockRunner* active_runner = nullptr;

BlockRunner& BlockRunner::here() {
  thread_local BlockRunner runner;
  return runner;
}

BlockRunner::BlockRunner() : fibers_(&BlockRunner::serve) {}

Fault BlockRunner::run(const Launch& launch, const Order& order, uint3 block) {
  prepare(launch, order, block);
  active_runner = this;
  starting_ = next();
  serving_ = &fibers_.take();
  main_.switch_to(*serving_);
  active_runner = nullptr;
  if (fault_.error != cudaSuccess) fibers_.reset();
  if (const auto written = shared_memory_.close()) {
    fail(cudaErrorIllegalAddress, "byte " + std::to_string(*written) + " was written, past the " +
                                      std::to_string(launch.shared_bytes) + " bytes of shared memory");
  }
  return std::move(fault_);
}

void BlockRunner::prepare(const Launch& launch, const Order& order, uint3 block) {
  const dim3 size = launch.block;
  const int threads = static_cast<int>(size.x * size.y * size.z);
  launch_ = &launch;
  fault_ = {};
  ended_ = at_barrier_ = warp_turn_ = lane_turn_ = 0;
  prepare_order(order, threads);

  if (copies_.size() < static_cast<size_t>(threads)) copies_.resize(threads);
  for (Copies& copies : copies_) copies.clear();  // those that nobody waited for never arrive
  threads_.resize(threads);
  Thread* thread = threads_.data();
  for (unsigned z = 0; z < size.z; ++z) {
    for (unsigned y = 0; y < size.y; ++y) {
      for (unsigned x = 0; x < size.x; ++x) *thread++ = {{x, y, z}, State::ready, nullptr, {}};
    }
  }
  warps_.resize(warp_order_.size());
  for (size_t w = 0; w < warps_.size(); ++w) {
    const int first = static_cast<int>(w) * kWarpSize;
    const int lanes = std::min(kWarpSize, threads - first);
    warps_[w] = {first, lanes, lanes, 0};
  }

  shared_memory_.open(launch.shared_bytes);
  const dim3 grid = launch.grid;
  running = {{}, block, {size.x, size.y, size.z}, {grid.x, grid.y, grid.z}, shared_memory_.data()};
  trace::begin_block((int64_t{block.z} * grid.y + block.y) * grid.x + block.x);
}

void BlockRunner::prepare_order(const Order& order, int threads) {
  if (threads == ordered_threads_ && order == order_) return;
  order_ = order;
  ordered_threads_ = threads;
  warp_order_ = order.of((threads + kWarpSize - 1) / kWarpSize);
  lane_order_.clear();
  for (int first = 0; first < threads; first += kWarpSize) {
    for (const int lane : order.of(std::min(kWarpSize, threads - first))) lane_order_.push_back(first + lane);
  }
}

/// What every fiber does: it runs threads until one of them, or the end of the block, needs another stack.
void BlockRunner::serve() {
  Fiber::begin();
  BlockRunner& runner = *active_runner;
  Fiber& self = *runner.serving_;
  for (;;) {
    Thread* thread = runner.starting_;
    do {
      runner.run_thread(*thread, self);
      thread = runner.next();
    } while (thread != nullptr && thread->fiber == nullptr);
    runner.fibers_.give_back(self);
    self.switch_to(thread != nullptr ? *thread->fiber : runner.main_);
  }
}

void BlockRunner::run_thread(Thread& thread, Fiber& fiber) {
  current_ = &thread;
  thread.fiber = &fiber;
  running.thread = thread.index;
  try {
    launch_->call(launch_->context);
  } catch (const std::exception& error) {
    fail(cudaErrorLaunchFailure, name(thread) + " threw an exception: " + error.what());
  } catch (...) {
    fail(cudaErrorLaunchFailure, name(thread) + " threw an exception");
  }
  thread.fiber = nullptr;
  thread.state = State::ended;
  ++ended_;
  if (fiber.overflowed()) {
    fail(cudaErrorLaunchOutOfResources, name(thread) + " overflowed its stack of " +
                                            std::to_string(FISHER_KERNELS_HOST_STACK_BYTES) +
                                            " bytes (FISHER_KERNELS_HOST_STACK_BYTES)");
  }
}

/// The thread whose turn it is. None if all have ended, or a fault was found.
///
/// A warp goes on until none of its lanes can, then the next does; after the last, the barrier of the block opens.
BlockRunner::Thread* BlockRunner::next() {
  if (fault_.error != cudaSuccess) return nullptr;
  for (;;) {
    Warp& warp = warps_[warp_order_[warp_turn_]];
    if (warp.ready == 0) {
      lane_turn_ = 0;
      if (++warp_turn_ < static_cast<int>(warps_.size())) continue;
      warp_turn_ = 0;
      if (!release_block()) return nullptr;
      continue;
    }
    if (lane_turn_ == warp.size) lane_turn_ = 0;
    Thread& thread = threads_[lane_order_[warp.first + lane_turn_++]];
    if (thread.state != State::ready) continue;
    thread.state = State::running;
    --warp.ready;
    return &thread;
  }
}

/// Lets others run until the running thread is woken and has its turn.
void BlockRunner::wait() {
  Thread& self = *current_;
  Thread* thread = next();
  if (thread != &self) {
    if (thread == nullptr) abandon();
    if (thread->fiber != nullptr) {
      self.fiber->switch_to(*thread->fiber);
    } else {
      starting_ = thread;
      serving_ = &fibers_.take();
      self.fiber->switch_to(*serving_);
    }
  }
  current_ = &self;
  running.thread = self.index;
}

void BlockRunner::wake(Thread& thread) {
  thread.state = State::ready;
  ++warps_[number(thread) / kWarpSize].ready;
}

void BlockRunner::refuse_launch() { stop(name(*current_) + " launched a kernel"); }

/// Leaves the block for good, with what its threads have on their stacks.
void BlockRunner::abandon() {
  for (;;) current_->fiber->switch_to(main_);
}

/// Ends the block at a fault of the running thread.
void BlockRunner::stop(std::string message) {
  fail(cudaErrorLaunchFailure, std::move(message));  // leaves nothing behind that would need to be freed
  abandon();
}

/// Notes the fault, if it is the block's first.
void BlockRunner::fail(cudaError_t error, std::string message) {
  if (fault_.error != cudaSuccess) return;
  const uint3 block = running.block;
  fault_ = {error, "block (" + std::to_string(block.x) + "," + std::to_string(block.y) + "," + std::to_string(block.z) +
                       "): " + message};
}

}  // namespace fisher_kernels::on_host
