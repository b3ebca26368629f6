#pragma once

// One block of a grid: its threads, each on a fiber while it waits, and the meetings that they wait for.

#include <cstdint>
#include <string>
#include <vector>

#include "copies.h"
#include "fiber.h"
#include "launch.h"
#include "order.h"
#include "running.h"
#include "shared_memory.h"

namespace fisher_kernels::on_host {

/// Why a launch stopped.
struct Fault {
  cudaError_t error = cudaSuccess;
  std::string message;
};

/// Runs blocks, one after the other. Each thread of the processor has its own, for fibers stay where they began.
class BlockRunner {
 public:
  /// The one of the calling thread of the processor.
  static BlockRunner& here();

  /// Runs one block to its end, or to its first fault.
  Fault run(const Launch& launch, const Order& order, uint3 block);

  /// Called by the running CUDA thread: see running.h. A kernel launches none.
  uint64_t meet_block(const Arrival& arrival);
  uint64_t meet_warp(const Arrival& arrival);
  void begin_copy(const Copies::Copy& copy);
  Copies& copies() { return copies_[running_number()]; }
  [[noreturn]] void refuse_launch();

  /// What a trace asks: the number of the running thread in its block, and whether an address is on its stack.
  int running_number() const { return number(*current_); }
  bool is_on_stack(const volatile void* address) const { return current_->fiber->holds(address); }

 private:
  enum class State : uint8_t { ready, running, waiting, ended };

  struct Thread {
    uint3 index;
    State state;
    Fiber* fiber;  // null before it starts and after it ends
    Arrival at;    // where it waits; `value` is what it receives there
  };

  struct Warp {
    int first;         // number of its first thread
    int size;          // threads that it has: fewer than 32 in the last warp of some blocks
    int ready;         // threads that could run
    uint32_t waiting;  // lanes that wait for other lanes
  };

  BlockRunner();

  void prepare(const Launch& launch, const Order& order, uint3 block);
  void prepare_order(const Order& order, int threads);

  [[noreturn]] static void serve();
  void run_thread(Thread& thread, Fiber& fiber);
  Thread* next();
  void wait();
  void wake(Thread& thread);
  void fail(cudaError_t error, std::string message);
  [[noreturn]] void stop(std::string message);
  [[noreturn]] void abandon();

  bool release_block();
  bool is_complete(const Warp& warp, uint32_t mask) const;
  void exchange(Warp& warp, uint32_t mask);
  const Thread* astray(const Warp& warp, uint32_t mask) const;
  std::string stuck() const;
  std::string describe(const Thread& thread) const;

  std::string name(const Thread& thread) const { return "thread " + std::to_string(number(thread)); }
  int number(const Thread& thread) const { return static_cast<int>(&thread - threads_.data()); }

  // What runs.
  const Launch* launch_ = nullptr;
  Fault fault_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  int ended_ = 0;
  int at_barrier_ = 0;
  std::vector<Copies> copies_;  // by thread

  // Whose turn it is.
  Order order_;
  int ordered_threads_ = 0;      // the block size that the two below are for
  std::vector<int> warp_order_;  // warps by turn
  std::vector<int> lane_order_;  // threads by turn, warp for warp
  int warp_turn_ = 0;
  int lane_turn_ = 0;

  // Where it runs.
  Fiber main_;
  FiberPool fibers_;
  SharedMemory shared_memory_;
  Thread* current_ = nullptr;
  Thread* starting_ = nullptr;  // the thread that a fiber just taken is to run
  Fiber* serving_ = nullptr;    // that fiber
};

/// The runner whose block runs on this thread of the processor; null outside kernels.
extern __thread BlockRunner* active_runner;

}  // namespace fisher_kernels::on_host
