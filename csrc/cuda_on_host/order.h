#pragma once

// The order in which what a GPU runs at once runs here, one after the other.

#include <cstdint>
#include <optional>
#include <vector>

namespace fisher_kernels::on_host {

class Order {
 public:
  /// What FISHER_KERNELS_HOST_ORDER asks for: `forward` (also when it is unset), `reverse` or a number that seeds a
  /// shuffle. Nothing if it is something else.
  static std::optional<Order> from_environment();

  /// The numbers 0 ... count - 1 in this order.
  std::vector<int> of(int count) const;

  /// Which of `count` blocks runs as number `turn`. Takes no memory, for there are many.
  int64_t block(int64_t turn, int64_t count) const;

  bool operator==(const Order& other) const { return kind_ == other.kind_ && seed_ == other.seed_; }

 private:
  enum class Kind { forward, reverse, shuffled };

  Kind kind_ = Kind::forward;
  uint32_t seed_ = 0;
};

}  // namespace fisher_kernels::on_host
