#pragma once

// Atomics on integers and fences. Those on floating point are left out on purpose: the order of their sums changes from
// run to run, and the project's kernels promise the same bits every time.

#include <type_traits>

namespace fisher_kernels::on_host {

/// Integers that CUDA has atomics for.
template <class T>
inline constexpr bool is_atomic =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

/// Only the address says what T is: a value is converted to it, as with CUDA's overloads.
template <class T>
using Integer = std::enable_if_t<is_atomic<T>, T>;

template <class T, class Choose>
T atomic_replace(T* address, Choose choose) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, choose(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace fisher_kernels::on_host

template <class T>
fisher_kernels::on_host::Integer<T> atomicAdd(T* address, std::common_type_t<T> value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
fisher_kernels::on_host::Integer<T> atomicMax(T* address, std::common_type_t<T> value) {
  return fisher_kernels::on_host::atomic_replace(address, [=](T old) { return old < value ? value : old; });
}

template <class T>
fisher_kernels::on_host::Integer<T> atomicMin(T* address, std::common_type_t<T> value) {
  return fisher_kernels::on_host::atomic_replace(address, [=](T old) { return value < old ? value : old; });
}

template <class T>
fisher_kernels::on_host::Integer<T> atomicOr(T* address, std::common_type_t<T> value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

template <class T>
fisher_kernels::on_host::Integer<T> atomicExch(T* address, std::common_type_t<T> value) {
  return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);
}

template <class T>
fisher_kernels::on_host::Integer<T> atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// By the order a traced build tells the fence of a block from the others.
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
