#include <cstdint>

#include "../kernels.h"
#include "grouped_gram.h"
#include "integers.h"
#include "shifted_gram.h"
#include "unfolded_gram.h"

// Of several ways to sum the products of patches the one that takes the fewest instructions: the shape decides.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kMostOffsets = 512;         // that are looked at in pairs
constexpr int64_t kMostGroupedColumns = 128;  // whose totals stay in a second-level cache with a group in each lane

/// A size in whole registers.
template <class A>
double padded(int64_t size, int64_t registers) {
  const int64_t width = registers * kLanes<A>;
  return static_cast<double>(ceil_div(size, width) * width);
}

// Multiply-adds of a sample, those in lanes that nothing fills among them, and other instructions as so many of them.

template <class A>
double grouped_products(const ConvGram& a) {
  constexpr double kProduct = 1.5, kOfEach = 2;  // the loads of small tiles; what unfolding a number costs
  const double columns = static_cast<double>(a.columns());
  return padded<A>(a.groups, 1) * a.positions() * columns * (kProduct * (columns + 1) / 2 + kOfEach);
}

template <class A>
double unfolded_products(const ConvGram& a) {
  constexpr double kOfEach = 8;
  const double columns = padded<A>(a.columns(), 2);
  return static_cast<double>(a.groups) * a.positions() * columns * ((columns + kWidth<A>) / 2 + kOfEach);
}

template <class A>
double shifted_products(const ConvGram& a, int64_t registers) {
  const double each = registers == 1 ? 2.0 : 1.2;  // finding the places costs as much as half a register's products
  const double channels = padded<A>(a.channels, registers);
  const double pairs = Pairs(a.depth).work() * Pairs(a.height).work() * Pairs(a.width).work();
  return each * a.groups * channels * channels / 2 * pairs;
}

template <class T>
void conv_gram(const ConvGram& a) {
  using A = Accumulator<T>;
  const double unfolded = unfolded_products<A>(a), grouped = grouped_products<A>(a);
  if (a.channels > 0 && a.offsets() <= kMostOffsets) {
    const double narrow = shifted_products<A>(a, 1), wide = shifted_products<A>(a, 2);
    if (narrow < wide && narrow < unfolded && narrow < grouped) {
      return ShiftedGram<A, 1>(a, narrow * a.samples).template run<T>();
    }
    if (wide < unfolded && wide < grouped) return ShiftedGram<A, 2>(a, wide * a.samples).template run<T>();
  }
  grouped < unfolded && a.columns() <= kMostGroupedColumns ? GroupedGram<T>(a)() : UnfoldedGram<T>(a)();
}

}  // namespace

void conv_gram_(const ConvGram& a) {
  if (a.columns() == 0) return;
  with_type(a.dtype, [&](auto* type) { conv_gram<std::remove_pointer_t<decltype(type)>>(a); });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
