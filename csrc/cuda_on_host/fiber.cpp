#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fisher_kernels::on_host {

namespace {

constexpr size_t kStackBytes = FISHER_KERNELS_HOST_STACK_BYTES;
// Not a multiple of a page: the tops of all stacks would share a few lines of the cache.
constexpr size_t kStride = kStackBytes + 5 * 64;
constexpr size_t kStacksAtOnce = 32;
// Below the lowest one: what overflows it a little, or the frame of a signal there, does not write into what others own.
constexpr size_t kSpare = 64 * 1024;
constexpr size_t kMapped = kSpare + kStacksAtOnce * kStride;
constexpr uint64_t kCanary[4] = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93};

#ifndef FISHER_KERNELS_HOST_UCONTEXT

/// Saves what a function must preserve on the stack, and the stack pointer in `*save`; then goes on where `load` was
/// saved. Kernels do not change rounding modes, so those are left alone.
__attribute__((naked, noinline)) void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

#endif

}  // namespace

#ifdef __SANITIZE_ADDRESS__
Fiber::Fiber() {
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes_);
  pthread_attr_destroy(&attributes);
  stack_ = static_cast<unsigned char*>(stack);
}
#else
Fiber::Fiber() : stack_(nullptr), bytes_(0) {}
#endif

Fiber::Fiber(unsigned char* stack, size_t bytes, void (*entry)()) : stack_(stack), bytes_(bytes), entry_(entry) {
  reset();
}

void Fiber::reset() {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack_, bytes_);
#endif
  std::memcpy(stack_, kCanary, sizeof(kCanary));
#ifndef FISHER_KERNELS_HOST_UCONTEXT
  // What switch_stack restores: six registers, then the address that `ret` takes. Above it a return address of zero,
  // where debuggers stop, at the alignment that a call leaves.
  auto* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack_ + bytes_) & ~uintptr_t{15});
  *--top = 0;
  *--top = reinterpret_cast<uint64_t>(entry_);
  for (int i = 0; i < 6; ++i) *--top = 0;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry_, 0);
#endif
}

void Fiber::begin() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void Fiber::switch_to(Fiber& other) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.bytes_);
#endif
#ifndef FISHER_KERNELS_HOST_UCONTEXT
  switch_stack(&top_, other.top_);
#else
  swapcontext(&context_, &other.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

bool Fiber::overflowed() const { return std::memcmp(stack_, kCanary, sizeof(kCanary)) != 0; }

FiberPool::~FiberPool() {
  for (void* stacks : stacks_) munmap(stacks, kMapped);
}

Fiber& FiberPool::take() {
  if (free_.empty()) grow();
  Fiber& fiber = *free_.back();
  free_.pop_back();
  return fiber;
}

void FiberPool::reset() {
  free_.clear();
  for (Fiber& fiber : fibers_) {
    fiber.reset();
    free_.push_back(&fiber);
  }
}

void FiberPool::grow() {
  // Mapped, not allocated: only the pages that a thread touches become memory.
  void* stacks = mmap(nullptr, kMapped, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) throw std::bad_alloc();
  stacks_.push_back(stacks);
  for (size_t i = 0; i < kStacksAtOnce; ++i) {
    fibers_.emplace_back(static_cast<unsigned char*>(stacks) + kSpare + i * kStride, kStackBytes, entry_);
    free_.push_back(&fibers_.back());
  }
}

}  // namespace fisher_kernels::on_host
