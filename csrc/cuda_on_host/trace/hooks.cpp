// What a compiler calls around each access under -fsanitize=thread. They are the tracer's here: libtsan is not linked.

#include <cstddef>
#include <cstdint>

#include "tracer.h"

using fisher_kernels::on_host::trace::Kind;
using fisher_kernels::on_host::trace::Tracer;

#define TRACED(address, bytes, kind) \
  Tracer::here().access(__builtin_return_address(0), address, bytes, kind)

extern "C" {

#define ACCESSES(bytes) \
  void __tsan_read##bytes(void* p) { TRACED(p, bytes, Kind::read); } \
  void __tsan_write##bytes(void* p) { TRACED(p, bytes, Kind::write); } \
  void __tsan_unaligned_read##bytes(void* p) { TRACED(p, bytes, Kind::read); } \
  void __tsan_unaligned_write##bytes(void* p) { TRACED(p, bytes, Kind::write); } \
  void __tsan_volatile_read##bytes(void* p) { TRACED(p, bytes, Kind::read); } \
  void __tsan_volatile_write##bytes(void* p) { TRACED(p, bytes, Kind::write); }

ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void* p, size_t bytes) { TRACED(p, bytes, Kind::read); }
void __tsan_write_range(void* p, size_t bytes) { TRACED(p, bytes, Kind::write); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// The atomics of atomics.h, which come with no order of their own: fences have it.
#define ATOMICS(bits, T) \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { \
    TRACED(p, sizeof(T), Kind::atomic); \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST); \
  } \
  void __tsan_atomic##bits##_store(volatile T* p, T value, int) { \
    TRACED(p, sizeof(T), Kind::atomic); \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST); \
  } \
  T __tsan_atomic##bits##_exchange(volatile T* p, T value, int) { \
    TRACED(p, sizeof(T), Kind::atomic); \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST); \
  } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T value, int) { \
    TRACED(p, sizeof(T), Kind::atomic); \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); \
  } \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T value, int) { \
    TRACED(p, sizeof(T), Kind::atomic); \
    return __atomic_fetch_or(p, value, __ATOMIC_SEQ_CST); \
  } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T value, int, int) { \
    TRACED(p, sizeof(T), Kind::atomic); \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  } \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T value, int, int) { \
    TRACED(p, sizeof(T), Kind::atomic); \
    return __atomic_compare_exchange_n(p, expected, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }

ATOMICS(32, int)
ATOMICS(64, long)

/// The order says whose fence it is, see atomics.h: that of a block hands nothing on to others.
void __tsan_atomic_thread_fence(int order) {
  if (order == __ATOMIC_SEQ_CST) Tracer::here().fence();
}

}  // extern "C"
