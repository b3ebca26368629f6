#include "shadow.h"

#include <algorithm>

namespace fisher_kernels::on_host::trace {

namespace {

constexpr size_t kMostPages = 2000;  // to be kept for the next launch
// Of blocks that read one place: a write that is ordered after these, and not after one that came later, is not seen.
constexpr size_t kMostReads = 64;

}  // namespace

void Shadow::begin_launch() {
  launch_scope_ = ++scopes_;
  more_.clear();
  last_number_ = ~uintptr_t{0};
  if (pages_.size() > kMostPages) pages_.clear();
}

Wrong Shadow::access(uintptr_t address, int bytes, bool shared, Kind kind, const Access& now, Access& other) {
  Wrong wrong = Wrong::nothing;
  for (uintptr_t place = address / kGrain * kGrain; place < address + bytes; place += kGrain) {
    const Wrong found = look(at(place, shared), shared, kind, now, other);
    if (wrong == Wrong::nothing) wrong = found;
  }
  return wrong;
}

Shadow::Cell& Shadow::at(uintptr_t address, bool shared) {
  const uintptr_t number = address / kPageBytes;
  if (number != last_number_) {
    last_number_ = number;
    last_page_ = &pages_[number];
    if (last_page_->empty()) last_page_->resize(kPageBytes / kGrain);
  }
  Cell& cell = (*last_page_)[address % kPageBytes / kGrain];
  const uint32_t scope = shared ? shared_scope_ : launch_scope_;
  if (cell.scope != scope) {
    cell.scope = scope;
    cell.more = 0;
    cell.written = cell.was_read = cell.under_way = false;
  }
  return cell;
}

Wrong Shadow::look(Cell& cell, bool shared, Kind kind, const Access& now, Access& other) {
  const auto is_before = [&](const Access& access) { return clocks_.is_before(access, now.thread); };
  Wrong wrong = Wrong::nothing;
  const auto found = [&](Wrong what, const Access& with) {
    if (wrong != Wrong::nothing) return;
    wrong = what;
    other = with;
  };
  if (cell.under_way && kind != Kind::copy_ends) found(Wrong::under_way, cell.write);
  if (cell.written && !(now.atomic && cell.write.atomic) && !is_before(cell.write)) found(Wrong::race, cell.write);
  if (kind == Kind::read) {
    if (shared && !cell.written) found(Wrong::unwritten, now);
    add_read(cell, now);
    return wrong;
  }
  if (cell.was_read && !is_before(cell.read)) found(Wrong::race, cell.read);
  if (cell.more != 0) {
    for (const Access& read : more_[cell.more - 1]) {
      if (!is_before(read)) found(Wrong::race, read);
    }
    more_[cell.more - 1].clear();
  }
  cell.write = now;
  cell.written = true;
  cell.was_read = false;
  cell.under_way = kind == Kind::copy_begins;
  return wrong;
}

/// Notes a read. A later one of two that are in order stands for both.
void Shadow::add_read(Cell& cell, const Access& now) {
  const auto is_before = [&](const Access& access) { return clocks_.is_before(access, now.thread); };
  const bool alone = cell.more == 0 || more_[cell.more - 1].empty();
  if (!cell.was_read || (alone && is_before(cell.read))) {
    cell.read = now;
    cell.was_read = true;
    return;
  }
  if (cell.more == 0) {
    more_.emplace_back();
    cell.more = static_cast<uint32_t>(more_.size());
  }
  auto& reads = more_[cell.more - 1];
  if (is_before(cell.read)) {
    cell.read = reads.back();
    reads.pop_back();
  }
  // Of reads of two warps between the same barriers one at least is out of order with any write there, and they are in
  // order with the same writes elsewhere.
  const auto other_warp = [&](const Access& read) {
    return read.block == now.block && read.epoch == now.epoch && read.thread / kWarpSize != now.thread / kWarpSize;
  };
  if (other_warp(cell.read)) {
    const auto twin = std::find_if(reads.begin(), reads.end(), [&](const Access& read) {
      return read.block == now.block && read.epoch == now.epoch && read.thread / kWarpSize == now.thread / kWarpSize;
    });
    if (twin != reads.end()) return;
  }
  reads.erase(std::remove_if(reads.begin(), reads.end(), is_before), reads.end());
  if (reads.size() < kMostReads) reads.push_back(now);
}

}  // namespace fisher_kernels::on_host::trace
