#include <cstdint>

#include "../kernels.h"
#include "integers.h"
#include "shifted_gram.h"
#include "unfolded_gram.h"

// Of two ways to sum the products of patches the one that takes fewer multiply-adds: the shape decides.
namespace fisher_kernels::FISHER_KERNELS_CAPABILITY {

namespace {

constexpr int64_t kMostOffsets = 512;  // that are looked at in pairs

/// Multiply-adds of a sample of a group, those in lanes that nothing fills among them.
template <class A>
double unfolded_products(const ConvGram& a) {
  constexpr double kOfEach = 8;  // what unfolding a number costs
  const double columns = static_cast<double>(ceil_div(a.columns(), kWidth<A>) * kWidth<A>);
  return a.positions() * columns * ((columns + kWidth<A>) / 2 + kOfEach);
}

template <class A>
double shifted_products(const ConvGram& a, int64_t registers) {
  const int64_t width = registers * kLanes<A>;
  const double channels = static_cast<double>(ceil_div(a.channels, width) * width);
  return channels * channels / 2 * Pairs(a.depth).work() * Pairs(a.height).work() * Pairs(a.width).work();
}

template <class T>
void conv_gram(const ConvGram& a) {
  using A = Accumulator<T>;
  if (a.channels == 0 || a.offsets() > kMostOffsets) return UnfoldedGram<T>(a)();
  const double narrow = shifted_products<A>(a, 1), wide = shifted_products<A>(a, 2);
  if (unfolded_products<A>(a) < (narrow < wide ? narrow : wide)) return UnfoldedGram<T>(a)();
  const double work = (narrow < wide ? narrow : wide) * a.samples * a.groups / 16;
  narrow < wide ? ShiftedGram<A, 1>(a, work).template run<T>() : ShiftedGram<A, 2>(a, work).template run<T>();
}

}  // namespace

void conv_gram_(const ConvGram& a) {
  if (a.columns() == 0) return;
  with_type(a.dtype, [&](auto* type) { conv_gram<std::remove_pointer_t<decltype(type)>>(a); });
}

}  // namespace fisher_kernels::FISHER_KERNELS_CAPABILITY
