#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "integers.h"
#include "lanes.h"
#include "panels.h"
#include "transpose.h"
#include "vector.h"

// Products of inverse blocks, whole or packed, with what belongs to each: d = P m.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {
namespace {

constexpr int kMostRegisters = 4;  // of a row for which the whole direction is kept in registers
constexpr int64_t kMostInLanes = 16;  // rows of packed blocks of which each has a lane

// Numbers of an inverse as lanes to compute in.
template <class A, class S>
inline Vector<A> load_inverse(const S* p) {
  return load(p);
}

/// d = P m for one block of at most kRegisters registers a row; the numbers of m lie `step` apart. Reads a register
/// past the end of the block and writes as much past that of d.
template <int kRegisters, class A, class S, class Step>
inline void multiply_in_registers(const S* block, int64_t n, const A* m, Step step, A* d) {
  Vector<A> sum[kRegisters] = {};
  for (int64_t j = 0; j < n; ++j) {
    for (int v = 0; v < kRegisters; ++v) sum[v] += m[j * step] * load_inverse<A>(block + j * n + v * kLanes<A>);
  }
  for (int v = 0; v < kRegisters; ++v) store(d + v * kLanes<A>, sum[v]);
}

/// The same for longer rows, one product of vectors after another.
template <class A, class S>
inline void multiply_by_rows(const S* block, int64_t n, const A* m, A* d) {
  constexpr int64_t kLength = kLanes<A>;
  const int64_t whole = n / kLength * kLength;
  // The end of a row is read as its last register, of which what was there before counts as zero.
  A last[kLength] = {};
  for (int64_t c = whole; c < n; ++c) last[c - n + kLength] = m[c];
  for (int64_t i = 0; i < n; ++i) {
    const S* const row = block + i * n;
    Vector<A> sum[4] = {};
    int64_t c = 0;
    for (; c + 4 * kLength <= n; c += 4 * kLength) {
      for (int v = 0; v < 4; ++v) sum[v] += load(m + c + v * kLength) * load_inverse<A>(row + c + v * kLength);
    }
    for (; c < whole; c += kLength) sum[0] += load(m + c) * load_inverse<A>(row + c);
    if (whole < n) sum[1] += load(last) * load_inverse<A>(row + n - kLength);
    d[i] = sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
}

/// d = P m for `count` packed blocks, at most one for each lane, that follow one another; m and d have lanes too. They
/// are copied first: memory that is read in its order comes sooner than what is picked from all blocks in turn.
template <class A, class S>
inline void multiply_packed_in_lanes(const S* blocks, int64_t count, int64_t n, const Vector<A>* moment,
                                     Vector<A>* direction) {
  constexpr int64_t kMostNumbers = kMostInLanes * (kMostInLanes + 1) / 2;
  const int64_t size = n * (n + 1) / 2;
  Vector<A> numbers[kMostNumbers];
  A wide[kLanes<A> * (kMostNumbers + 1)];
  for_registers<A>(count * size, [&](int64_t i, const auto& load, const auto&) { store(wide + i, load(blocks + i)); });
  load_lanes(wide, count, size, numbers);
  const Vector<A>* entry = numbers;
  for (int64_t i = 0; i < n; ++i, ++entry) {
    Vector<A> sum = {};
    for (int64_t j = 0; j < i; ++j, ++entry) {  // each entry below the diagonal serves twice
      sum += *entry * moment[j];
      direction[j] += *entry * moment[i];
    }
    direction[i] = sum + *entry * moment[i];
  }
}

/// The same of rows of m and d, which follow one another.
template <class A, class S>
inline void multiply_packed_in_lanes(const S* blocks, int64_t count, int64_t n, const A* m, A* d) {
  Vector<A> moment[kMostInLanes], direction[kMostInLanes];
  load_lanes(m, count, n, moment);
  multiply_packed_in_lanes<A>(blocks, count, n, moment, direction);
  store_lanes(direction, kAllLanes<A> >> (kLanes<A> - count), n, d);
}

// A packed triangle that fits in three registers is spread out to whole rows there, as they are needed.
#if defined(__AVX512F__)
template <class A>
constexpr int64_t kMostSpread = sizeof(A) == 4 ? 9 : 0;  // rows of such a triangle

/// Where row j of P has its entries: at low[j] of the first two registers, or, in lanes of the mask, at high[j] of the
/// third.
template <int64_t n>
struct RowsOfTriangle {
  alignas(64) int32_t low[n][16] = {};
  alignas(64) int32_t high[n][16] = {};
  uint16_t in_high[n] = {};

  constexpr RowsOfTriangle() {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t place = i < j ? j * (j + 1) / 2 + i : i * (i + 1) / 2 + j;
        if (place < 32) {
          low[j][i] = static_cast<int32_t>(place);
        } else {
          high[j][i] = static_cast<int32_t>(place - 32);
          in_high[j] = static_cast<uint16_t>(in_high[j] | 1 << i);
        }
      }
    }
  }
};

/// d = P m for one packed block, in the order that a whole one is multiplied in. Reads a register past the end of the
/// block and writes as much past that of d.
template <int64_t n, class S, class Step>
inline void multiply_packed_in_registers(const S* block, const float* m, Step step, float* d) {
  constexpr int64_t kNumbers = n * (n + 1) / 2;
  static constexpr RowsOfTriangle<n> kRows{};
  const Vector<float> first = load(block);
  const Vector<float> second = kNumbers > 16 ? load(block + 16) : first;
  Vector<float> third = first;
  if constexpr (kNumbers > 32) third = load(block + 32);
  Vector<float> sum = {};
#pragma GCC unroll 9
  for (int64_t j = 0; j < n; ++j) {
    __m512 row = _mm512_permutex2var_ps(first, load_bits<__m512i>(kRows.low[j]), second);
    if constexpr (kNumbers > 32) {
      row = _mm512_mask_permutexvar_ps(row, kRows.in_high[j], load_bits<__m512i>(kRows.high[j]), third);
    }
    sum += m[j * step] * Vector<float>(row);
  }
  store(d, sum);
}
#else
template <class A>
constexpr int64_t kMostSpread = 0;

template <int64_t n, class S, class A, class Step>
void multiply_packed_in_registers(const S* block, const A* m, Step step, A* d);
#endif

/// d = P m for one packed block of longer rows. `work` has room for three rows and a register each.
template <class A, class S>
inline void multiply_packed_by_rows(const S* block, int64_t n, const A* m_numbers, A* d, A* work) {
  constexpr int64_t kLength = kLanes<A>;
  const int64_t padded = n + kLength;
  A* const m = work;
  A* const down = work + padded;
  A* const across = work + 2 * padded;
  for (int64_t i = 0; i < padded; ++i) {
    m[i] = i < n ? m_numbers[i] : A(0);
    down[i] = across[i] = 0;
  }
  for (int64_t i = 0; i < n; block += ++i) {
    Vector<A> sum = {};
    int64_t c = 0;
    for (; c + kLength <= i; c += kLength) {
      const Vector<A> row = load_inverse<A>(block + c);
      sum += row * load(m + c);
      store(down + c, load(down + c) + m[i] * row);
    }
    const Vector<A> row = first_lanes<A>(load_inverse<A>(block + c), i - c);
    sum += row * load(m + c);
    store(down + c, load(down + c) + m[i] * row);
    across[i] = sum_lanes<A>(sum) + m[i] * static_cast<A>(widen(block[i]));
  }
  for (int64_t i = 0; i < n; ++i) d[i] = down[i] + across[i];
}

/// Whether packed blocks of this size are spread out, one after another, and not multiplied in lanes. Only sizes that
/// with_size has constants for can be.
template <class A>
constexpr bool is_spread(int64_t n) {
  return n <= kMostSpread<A> && n != 6 && n != 8;
}

template <class A, class S, class Size>
inline void multiply_block(const S* block, Size size, bool packed, const A* m, A* d, A* work) {
  constexpr std::integral_constant<int64_t, 1> kStep{};
  const int64_t n = size, registers = ceil_div(n, kLanes<A>);
  if constexpr (!std::is_same_v<Size, int64_t>) {
    if constexpr (is_spread<A>(Size::value)) {
      if (packed) return multiply_packed_in_registers<Size::value>(block, m, kStep, d);
    }
  }
  if (packed) return multiply_packed_by_rows<A>(block, n, m, d, work);
  switch (registers) {
    case 1: return multiply_in_registers<1, A>(block, n, m, kStep, d);
    case 2: return multiply_in_registers<2, A>(block, n, m, kStep, d);
    case 3: return multiply_in_registers<3, A>(block, n, m, kStep, d);
    case kMostRegisters: return multiply_in_registers<kMostRegisters, A>(block, n, m, kStep, d);
    default: return multiply_by_rows<A>(block, n, m, d);
  }
}

/// d = m P for kRows rows, `stride` numbers from one another, in kRegisters registers of columns of P, which has rows
/// of n numbers: `count` of them, and as many numbers of a row of m and, from these columns on, of d, are there. A
/// register of P that reaches past the end of a row is read in part where kWhole says so.
template <int kRows, int kRegisters, bool kWhole, class A, class S>
inline void multiply_rows(const S* block, int64_t n, int64_t column, const A* m, int64_t stride, int64_t count, A* d) {
  constexpr int64_t kLength = kLanes<A>;
  Vector<A> sums[kRows][kRegisters] = {};
  const S* row = block + column;
  for (int64_t k = 0; k < count; ++k, row += n) {
    Vector<A> entries[kRegisters];
    for (int v = 0; v < kRegisters; ++v) {
      entries[v] = kWhole ? Vector<A>(load(row + v * kLength)) : Vector<A>(load(row + v * kLength, n - column));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const A factor = m[i * stride + k];
      for (int v = 0; v < kRegisters; ++v) sums[i][v] += factor * entries[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kRegisters; ++v) {
      const int64_t at = column + v * kLength, left = count - at;
      if (left >= kLength) {
        store(d + i * stride + at, sums[i][v]);
      } else if (left > 0) {
        store(d + i * stride + at, sums[i][v], left);
      }
    }
  }
}

/// d = m P for rows that share a block. The columns of P that are being read stay in the nearest cache.
template <class A, class S>
inline void multiply_shared(const S* block, int64_t n, const A* m, int64_t rows, int64_t stride, int64_t count, A* d) {
  const auto all_rows = [&](auto registers, auto whole, int64_t column) {
    constexpr int kRegisters = decltype(registers)::value;
    constexpr bool kWhole = decltype(whole)::value;
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows) {
      multiply_rows<kTileRows, kRegisters, kWhole>(block, n, column, m + r * stride, stride, count, d + r * stride);
    }
    for (; r < rows; ++r) {
      multiply_rows<1, kRegisters, kWhole>(block, n, column, m + r * stride, stride, count, d + r * stride);
    }
  };
  using std::integral_constant;
  int64_t column = 0;
  for (; column + kWidth<A> <= n && column < count; column += kWidth<A>) {
    all_rows(integral_constant<int, 2>{}, integral_constant<bool, true>{}, column);
  }
  for (; column < smaller(n, count); column += kLanes<A>) {
    if (column + kLanes<A> <= n) {
      all_rows(integral_constant<int, 1>{}, integral_constant<bool, true>{}, column);
    } else {
      all_rows(integral_constant<int, 1>{}, integral_constant<bool, false>{}, column);
    }
  }
}

/// Calls body(n, packed), with constants for what is common.
template <class Body>
inline void with_size(int64_t n, bool packed, const Body& body) {
  using std::integral_constant;
  const auto with = [&](auto size) {
    packed ? body(size, integral_constant<bool, true>{}) : body(size, integral_constant<bool, false>{});
  };
  switch (n) {
    case 2: return with(integral_constant<int64_t, 2>{});
    case 3: return with(integral_constant<int64_t, 3>{});
    case 4: return with(integral_constant<int64_t, 4>{});
    case 5: return with(integral_constant<int64_t, 5>{});
    case 7: return with(integral_constant<int64_t, 7>{});
    case 9: return with(integral_constant<int64_t, 9>{});
    default: return with(n);
  }
}

/// Memory that is asked for while blocks are multiplied: so many bytes for each of them, from three places on.
struct Ahead {
  const char* places[3];
  int64_t bytes[3];

  void fetch(int64_t first, int64_t count) const {
    constexpr int64_t kLine = 64;
    for (int k = 0; k < 3; ++k) {
      const char* const end = places[k] + (first + count) * bytes[k];
      for (const char* p = places[k] + first * bytes[k]; p < end; p += kLine) __builtin_prefetch(p);
    }
  }
};

/// Rows of the largest blocks that multiply_side_by_side is for: packed ones are multiplied in lanes, and whole ones in
/// registers, of which few hold less than that where registers are short.
template <class A>
constexpr int64_t kMostSideBySide = larger(kMostInLanes, kMostRegisters * kLanes<A>);

/// Whether multiply_side_by_side is for blocks of this size: smaller ones cannot be transposed in pieces.
template <class A>
constexpr bool goes_side_by_side(int64_t n, bool packed) {
  return n >= kPiece<A> && n <= (packed ? kMostInLanes : kMostRegisters * kLanes<A>);
}

/// d = P m for `count` blocks, a multiple of kLanes, whose numbers in m and d lie side by side: number k of block i at
/// k * count + i. Blocks from `safe` on are copied first, to where a register past their end may be read. One function
/// for all types of parameters.
template <class A, class S>
__attribute__((noinline)) void multiply_side_by_side(const S* blocks, int64_t count, int64_t safe, int64_t size,
                                                     bool packed, const Ahead& ahead, const A* m, A* d, S* copy) {
  using std::integral_constant;
  constexpr int64_t kPitch = kMostRegisters * kLanes<A>;
  constexpr integral_constant<int64_t, kLanes<A>> kStep{};
  const int64_t numbers = packed ? size * (size + 1) / 2 : size * size;
  Vector<A> moment[kMostSideBySide<A>];
  Vector<A> direction[kMostSideBySide<A>];
  const auto for_tiles = [&](const auto& multiply) {
    for (int64_t t = 0; t < count; t += kLanes<A>) {
      ahead.fetch(t, kLanes<A>);
      for (int64_t k = 0; k < size; ++k) moment[k] = load(m + k * count + t);
      multiply(t);
      for (int64_t k = 0; k < size; ++k) store(d + k * count + t, direction[k]);
    }
  };
  const auto one_by_one = [&](auto n, const auto& multiply_one) {
    for_tiles([&](int64_t t) {
      A numbers_of_m[kLanes<A> * kPitch], rows[kLanes<A> * kPitch];
      for (int64_t k = 0; k < n; ++k) store(numbers_of_m + k * kStep, moment[k]);
      for (int64_t r = 0; r < kLanes<A>; ++r) {
        const S* block = blocks + (t + r) * numbers;
        if (t + r >= safe) {
          std::memcpy(copy, block, numbers * sizeof(S));
          block = copy;
        }
        multiply_one(block, n, numbers_of_m + r, rows + r * kPitch);
      }
      for (int64_t k = 0; k < n; k += kPiece<A>) {
        load_piece(rows, kLanes<A>, kPitch, smaller(k, n - kPiece<A>), direction);
      }
    });
  };
  constexpr integral_constant<int64_t, 9> kNine{};
  if constexpr (is_spread<A>(9)) {
    if (packed && size == 9) {
      return one_by_one(kNine, [=](const S* block, auto n, const A* from, A* to) {
        multiply_packed_in_registers<decltype(n)::value>(block, from, kStep, to);
      });
    }
  }
  if (packed) {
    return for_tiles([&](int64_t t) {
      multiply_packed_in_lanes<A>(blocks + t * numbers, kLanes<A>, size, moment, direction);
    });
  }
  const auto whole = [&](auto registers, auto n) {
    one_by_one(n, [=](const S* block, auto rows, const A* from, A* to) {
      multiply_in_registers<decltype(registers)::value, A>(block, rows, from, kStep, to);
    });
  };
  constexpr int kOfNine = static_cast<int>(ceil_div(9, kLanes<A>));
  if constexpr (kOfNine <= kMostRegisters) {
    if (size == 9) return whole(integral_constant<int, kOfNine>{}, kNine);
  }
  with_constant<kMostRegisters>(ceil_div(size, kLanes<A>), [&](auto registers) { whole(registers, size); });
}

}  // namespace
}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
