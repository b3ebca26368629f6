#include "copies.h"

#include <cstring>

#include "block.h"
#include "trace.h"

namespace fisher_kernels::on_host {

void begin_copy(void* to_shared, const void* from, int bytes) {
  active_runner->begin_copy({to_shared, from, bytes, __builtin_return_address(0)});
}

void end_copies() {
  Copies& own = active_runner->copies();
  own.ends.push_back(own.copies.size());
}

void wait_for_copies(int groups) { active_runner->copies().wait(groups); }

void Copies::clear() {
  copies.clear();
  ends.clear();
}

void Copies::wait(size_t groups) {
  if (ends.size() <= groups) return;
  const size_t over = ends.size() - groups, arrived = ends[over - 1];
  for (size_t i = 0; i < arrived; ++i) {
    const Copy& copy = copies[i];
    std::memcpy(copy.to, copy.from, copy.bytes);
    trace::end_copy(copy.place, copy.to, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(arrived));
  ends.erase(ends.begin(), ends.begin() + static_cast<std::ptrdiff_t>(over));
  for (size_t& end : ends) end -= arrived;
}

void BlockRunner::begin_copy(const Copies::Copy& copy) {
  const auto addresses = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from);
  if (addresses % copy.bytes != 0) {
    stop(name(*current_) + " begins an asynchronous copy of " + std::to_string(copy.bytes) +
         " bytes between addresses that are no multiples of so many");
  }
  trace::begin_copy(copy.place, copy.to, copy.from, copy.bytes);
  copies().copies.push_back(copy);
}

}  // namespace fisher_kernels::on_host
