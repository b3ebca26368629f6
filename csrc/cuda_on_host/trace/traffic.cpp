#include "traffic.h"

#include <algorithm>
#include <tuple>

#include "running.h"

namespace fisher_kernels::on_host::trace {

namespace {

constexpr uintptr_t kSector = 32;
constexpr uintptr_t kBank = 4;  // bytes of one
constexpr uintptr_t kBanks = 32;
constexpr int kWidest = 16;  // bytes that a lane moves at once

size_t distinct_of(std::vector<uintptr_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers.size();
}

}  // namespace

void Traffics::begin_launch() {
  parts_.clear();
  by_deed_.clear();
  for (auto& sectors : sectors_) sectors.clear();
}

void Traffics::add(uint32_t place, int thread, uintptr_t address, int bytes, bool shared, bool write) {
  parts_.push_back({place, 0, static_cast<uint16_t>(thread), static_cast<uint16_t>(bytes), address, shared, write});
}

/// Joins what a thread moves side by side, one after the other, up to 16 bytes at a multiple of so many: the host's
/// compiler takes vectors apart.
void Traffics::join() {
  std::vector<Part> joined;
  std::unordered_map<uint16_t, size_t> last;  // of a thread
  for (const Part& part : parts_) {
    if (const auto found = last.find(part.thread); found != last.end()) {
      Part& before = joined[found->second];
      const bool follows = before.shared == part.shared && before.write == part.write &&
                           before.place != part.place && before.address + before.bytes == part.address &&
                           before.bytes % part.bytes == 0 && before.bytes + part.bytes <= kWidest;
      const int both = before.bytes + part.bytes, aligned = both <= 4 ? 4 : both <= 8 ? 8 : kWidest;
      if (follows && before.address % aligned == 0) {
        before.bytes = static_cast<uint16_t>(before.bytes + part.bytes);
        continue;
      }
    }
    last[part.thread] = joined.size();
    joined.push_back(part);
  }
  parts_ = std::move(joined);
}

void Traffics::end_block() {
  join();
  std::unordered_map<uint64_t, uint32_t> turns[2][2];
  for (Part& part : parts_) part.turn = turns[part.shared][part.write][uint64_t{part.place} << 16 | part.thread]++;
  const auto request = [](const Part& part) { return std::tuple(part.deed(), part.thread / kWarpSize, part.turn); };
  std::sort(parts_.begin(), parts_.end(), [&](const Part& a, const Part& b) {
    return std::tuple_cat(request(a), std::tuple(a.thread)) < std::tuple_cat(request(b), std::tuple(b.thread));
  });
  for (size_t first = 0, last = 0; first < parts_.size(); first = last) {
    while (last < parts_.size() && request(parts_[last]) == request(parts_[first])) ++last;
    count(parts_.data() + first, parts_.data() + last);
  }
  parts_.clear();
}

/// One request.
void Traffics::count(const Part* first, const Part* last) {
  Traffic& traffic = by_deed_[first->deed()];
  ++traffic.requests;
  std::vector<uintptr_t> units, bytes;
  int widest = 0;
  for (const Part* part = first; part < last; ++part) {
    traffic.bytes += part->bytes;
    widest = std::max<int>(widest, part->bytes);
  }
  if (!first->shared) {
    for (const Part* part = first; part < last; ++part) {
      const uintptr_t end = part->address + part->bytes;
      for (uintptr_t sector = part->address / kSector; sector * kSector < end; ++sector) units.push_back(sector);
      for (int b = 0; b < part->bytes; ++b) bytes.push_back(part->address + b);
    }
    traffic.units += distinct_of(units);
    traffic.least += (distinct_of(bytes) + kSector - 1) / kSector;
    sectors_[first->write].insert(units.begin(), units.end());
    return;
  }
  // 32 lanes of 4 bytes go at once, 16 of 8 or 8 of 16. A bank gives one of its words at a time, to all who ask for it.
  const int lanes = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
  for (int from = 0; from < kWarpSize; from += lanes) {
    std::vector<uintptr_t> words;
    for (const Part* part = first; part < last; ++part) {
      const int lane = part->thread % kWarpSize;
      if (lane < from || lane >= from + lanes) continue;
      for (uintptr_t w = part->address / kBank; w <= (part->address + part->bytes - 1) / kBank; ++w) words.push_back(w);
    }
    if (words.empty()) continue;
    const size_t all = distinct_of(words);
    size_t of_bank[kBanks] = {};
    for (const uintptr_t word : words) ++of_bank[word % kBanks];
    traffic.units += *std::max_element(of_bank, of_bank + kBanks);
    traffic.least += (all + kBanks - 1) / kBanks;
  }
}

}  // namespace fisher_kernels::on_host::trace
