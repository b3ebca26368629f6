#pragma once

// Fibers: stacks that one thread of the processor switches between, and the pool they come from.

#include <cstddef>
#include <deque>
#include <vector>

// Switching by hand takes a twentieth of the time that ucontext does, which asks the system for the signal mask.
// -DFISHER_KERNELS_HOST_UCONTEXT chooses the latter here too.
#if !defined(__x86_64__) && !defined(FISHER_KERNELS_HOST_UCONTEXT)
#define FISHER_KERNELS_HOST_UCONTEXT
#endif
#ifdef FISHER_KERNELS_HOST_UCONTEXT
#include <ucontext.h>
#endif

/// Bytes of each CUDA thread's stack. Sanitizers need more of it, and so do kernels compiled without optimization.
#ifndef FISHER_KERNELS_HOST_STACK_BYTES
#ifdef __SANITIZE_ADDRESS__
#define FISHER_KERNELS_HOST_STACK_BYTES (256 * 1024)
#else
#define FISHER_KERNELS_HOST_STACK_BYTES (128 * 1024)
#endif
#endif

namespace fisher_kernels::on_host {

/// Where to go on, and on which stack.
class Fiber {
 public:
  /// The stack that this thread of the processor came with.
  Fiber();
  /// A stack of its own, on which `entry` will run. It must call `begin` first and never return.
  Fiber(unsigned char* stack, size_t bytes, void (*entry)());

  /// Forgets where to go on: `entry` will run again.
  void reset();

  /// Whether something was written below the end of the stack, as far as a few bytes there can tell.
  bool overflowed() const;

  /// Whether an address is on this stack.
  bool holds(const volatile void* address) const {
    const auto* byte = static_cast<const volatile unsigned char*>(address);
    return byte >= stack_ && byte < stack_ + bytes_;
  }

  /// The first thing a fiber does.
  static void begin();

  /// Leaves this fiber, the running one, for another. Returns when something switches back.
  void switch_to(Fiber& other);

 private:
  unsigned char* stack_;
  size_t bytes_;
  void (*entry_)() = nullptr;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;  // AddressSanitizer's own, of this fiber
#endif
#ifndef FISHER_KERNELS_HOST_UCONTEXT
  void* top_ = nullptr;  // of the stack, once the registers are saved there
#else
  ucontext_t context_;
#endif
};

/// Fibers to take and give back: the last given back is the first taken, for its stack is still in the cache.
class FiberPool {
 public:
  explicit FiberPool(void (*entry)()) : entry_(entry) {}
  ~FiberPool();
  FiberPool(const FiberPool&) = delete;
  FiberPool& operator=(const FiberPool&) = delete;

  Fiber& take();
  void give_back(Fiber& fiber) { free_.push_back(&fiber); }

  /// Takes all fibers back, wherever they stopped.
  void reset();

 private:
  void grow();

  void (*entry_)();
  std::deque<Fiber> fibers_;  // never moved
  std::vector<Fiber*> free_;
  std::vector<void*> stacks_;
};

}  // namespace fisher_kernels::on_host
