#pragma once

// Loads and stores with a cache hint: here without the hint. A vector type is moved whole, so that a sanitizer sees an
// address that the device would refuse.

#include <type_traits>

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

template <class T>
inline T __ldcg(const T* address) {
  return *address;
}

template <class T>
inline T __ldcs(const T* address) {
  return *address;
}

template <class T>
inline void __stcg(T* address, std::common_type_t<T> value) {
  *address = value;
}

template <class T>
inline void __stcs(T* address, std::common_type_t<T> value) {
  *address = value;
}
