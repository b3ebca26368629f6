#include "order.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string_view>

namespace fisher_kernels::on_host {

std::optional<Order> Order::from_environment() {
  const char* text = std::getenv("FISHER_KERNELS_HOST_ORDER");
  Order order;
  if (text == nullptr || std::string_view(text) == "forward") return order;
  if (std::string_view(text) == "reverse") {
    order.kind_ = Kind::reverse;
    return order;
  }
  char* end = nullptr;
  order.kind_ = Kind::shuffled;
  order.seed_ = static_cast<uint32_t>(std::strtoul(text, &end, 10));
  if (end == text || *end != '\0') return std::nullopt;
  return order;
}

std::vector<int> Order::of(int count) const {
  std::vector<int> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  if (kind_ == Kind::reverse) std::reverse(numbers.begin(), numbers.end());
  if (kind_ == Kind::shuffled) std::shuffle(numbers.begin(), numbers.end(), std::mt19937(seed_));
  return numbers;
}

int64_t Order::block(int64_t turn, int64_t count) const {
  switch (kind_) {
    case Kind::forward: return turn;
    case Kind::reverse: return count - 1 - turn;
    case Kind::shuffled: break;
  }
  // Steps that share no factor with the count meet every block once.
  int64_t step = 1 + int64_t{seed_} % count;
  while (std::gcd(step, count) != 1) ++step;
  const auto from_start = static_cast<unsigned __int128>(turn) * step;
  return static_cast<int64_t>((from_start + seed_) % count);
}

}  // namespace fisher_kernels::on_host
