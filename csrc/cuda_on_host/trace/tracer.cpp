#include "tracer.h"

#include <dlfcn.h>

#include <cstdlib>
#include <fstream>

#include "block.h"

namespace fisher_kernels::on_host::trace {

namespace {

const char* name(Wrong wrong) {
  switch (wrong) {
    case Wrong::race: return "race";
    case Wrong::under_way: return "copy under way";
    case Wrong::unwritten: return "unwritten";
    case Wrong::nothing: break;
  }
  return "";
}

const char* verb(Kind kind) {
  switch (kind) {
    case Kind::read: return "reads";
    case Kind::write: return "writes";
    case Kind::atomic: return "changes at once";
    case Kind::copy_begins: return "begins to copy to";
    case Kind::copy_ends: return "has copied to";
  }
  return "";
}

std::string text(dim3 size) {
  return "[" + std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z) + "]";
}

}  // namespace

Tracer& Tracer::here() {
  static Tracer tracer;
  return tracer;
}

Tracer::Tracer() {
  if (const char* path = std::getenv("FISHER_KERNELS_HOST_TRACE")) path_ = path;
  counts_ = std::getenv("FISHER_KERNELS_HOST_TRAFFIC") != nullptr;
  Dl_info module;
  if (dladdr(reinterpret_cast<const void*>(&Tracer::here), &module) == 0) return;
  base_ = reinterpret_cast<uintptr_t>(module.dli_fbase);
  module_ = module.dli_fname;
}

void Tracer::begin_launch(const Launch& launch) {
  one_.lock();
  launch_ = &launch;
  findings_.clear();
  clocks_.begin_launch();
  shadow_.begin_launch();
  traffic_.begin_launch();
}

void Tracer::end_launch() {
  traffic_.end_block();
  if (!path_.empty()) write();
  launch_ = nullptr;
  one_.unlock();
}

void Tracer::begin_block(int64_t block) {
  traffic_.end_block();
  clocks_.begin_block(static_cast<uint32_t>(block));
  shadow_.begin_block();
}

void Tracer::fence() {
  if (active_runner != nullptr) clocks_.fence(active_runner->running_number());
}

void Tracer::access(const void* place, const volatile void* address, size_t bytes, Kind kind) {
  if (active_runner == nullptr || bytes == 0) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (at - reinterpret_cast<uintptr_t>(launch_->context) < launch_->parameter_bytes + 64) return;
  if (at - reinterpret_cast<uintptr_t>(&running) < sizeof(running)) return;
  const bool shared = at - reinterpret_cast<uintptr_t>(running.shared) < launch_->shared_bytes;
  if (!shared && active_runner->is_on_stack(address)) return;
  const int thread = active_runner->running_number();
  if (kind == Kind::atomic) clocks_.atomic(thread, at);
  const Access now = clocks_.now(thread, place_of(place), kind == Kind::atomic);
  if (counts_ && kind != Kind::copy_ends) {
    traffic_.add(now.place, thread, at, static_cast<int>(bytes), shared, kind != Kind::read);
  }
  Access other;
  const Wrong wrong = shadow_.access(at, static_cast<int>(bytes), shared, kind, now, other);
  if (wrong == Wrong::nothing) return;
  Finding& finding = findings_[{wrong, shared, other.place, now.place}];
  if (finding.count++ == 0) finding.first = describe(wrong, shared, at, kind, now, other);
}

/// A place in the module, of the call that traces an access there: the access is the instruction before.
uint32_t Tracer::place_of(const void* place) const {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(place) - base_);
}

std::string Tracer::describe(Wrong wrong, bool shared, uintptr_t address, Kind kind, const Access& now,
                             const Access& other) const {
  const auto thread = [](const Access& of) {
    return "thread " + std::to_string(of.thread) + " of block " + std::to_string(of.block);
  };
  std::string said = thread(now) + " " + verb(kind) + " ";
  const uintptr_t byte = address - reinterpret_cast<uintptr_t>(running.shared);
  said += shared ? "byte " + std::to_string(byte) + " of shared memory" : "memory of the device";
  if (wrong == Wrong::unwritten) return said + ", which the block has not written";
  if (wrong == Wrong::under_way) return said + ", where a copy of " + thread(other) + " is under way";
  return said + ", in no order with " + thread(other);
}

/// A line of JSON for the launch.
void Tracer::write() const {
  std::ofstream file(path_, std::ios::app);
  file << "{\"module\":\"" << module_ << "\",\"kernel\":" << reinterpret_cast<uintptr_t>(launch_->kernel) - base_
       << ",\"grid\":" << text(launch_->grid) << ",\"block\":" << text(launch_->block)
       << ",\"shared\":" << launch_->shared_bytes << ",\"findings\":[";
  const char* separator = "";
  for (const auto& [what, finding] : findings_) {
    const auto [wrong, shared, first, second] = what;
    file << separator << "{\"what\":\"" << name(wrong) << "\",\"memory\":\"" << (shared ? "shared" : "device")
         << "\",\"places\":[" << first << "," << second << "],\"count\":" << finding.count << ",\"first\":\""
         << finding.first << "\"}";
    separator = ",";
  }
  file << "],\"traffic\":[";
  separator = "";
  for (const auto& [deed, traffic] : traffic_.by_deed()) {
    const auto [place, shared, write] = deed;
    file << separator << '[' << place << ',' << shared << ',' << write << ',' << traffic.requests << ','
         << traffic.bytes << ',' << traffic.units << ',' << traffic.least << ']';
    separator = ",";
  }
  file << "],\"distinct\":[" << traffic_.distinct(false) << ',' << traffic_.distinct(true) << "]}\n";
}

Launching::Launching(const Launch& launch) { Tracer::here().begin_launch(launch); }
Launching::~Launching() { Tracer::here().end_launch(); }

void begin_block(int64_t block) { Tracer::here().begin_block(block); }
void meet_block() { Tracer::here().meet_block(); }

void meet_warp(Meeting meeting, int first, uint32_t mask) {
  if (meeting == Meeting::syncwarp) Tracer::here().meet_warp(first, mask);
}

void begin_copy(const void* place, void* to, const void* from, int bytes) {
  Tracer::here().access(place, from, bytes, Kind::read);
  Tracer::here().access(place, to, bytes, Kind::copy_begins);
}

void end_copy(const void* place, void* to, int bytes) { Tracer::here().access(place, to, bytes, Kind::copy_ends); }

}  // namespace fisher_kernels::on_host::trace
