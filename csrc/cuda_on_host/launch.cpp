#include "launch.h"

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <set>
#include <utility>

#include "block.h"
#include "order.h"
#include "runtime_api.h"
#include "trace.h"

namespace fisher_kernels::on_host {

namespace {

constexpr dim3 kMaxGrid{0x7fffffff, 0xffff, 0xffff};
constexpr dim3 kMaxBlock{1024, 1024, 64};
constexpr int64_t kMaxThreads = 1024;  // of a block
constexpr size_t kMaxParameterBytes = 32764;
// Waking other threads of the processor takes longer than most launches do; on a busy machine, milliseconds.
constexpr std::chrono::milliseconds kAlone{1};

thread_local Fault last;

std::string text(dim3 size) {
  return "(" + std::to_string(size.x) + "," + std::to_string(size.y) + "," + std::to_string(size.z) + ")";
}

bool fits(dim3 size, dim3 most) {
  return size.x > 0 && size.y > 0 && size.z > 0 && size.x <= most.x && size.y <= most.y && size.z <= most.z;
}

int64_t volume(dim3 size) { return int64_t{size.x} * size.y * size.z; }

Fault invalid_configuration(const std::string& message) { return {cudaErrorInvalidConfiguration, message}; }

Fault invalid_value(const std::string& message) { return {cudaErrorInvalidValue, message}; }

/// Why CUDA would not start this; no fault if it would.
Fault refusal(const Launch& launch) {
  if (!fits(launch.grid, kMaxGrid)) {
    return invalid_configuration("a grid of " + text(launch.grid) + " blocks: 1 to " + text(kMaxGrid) + " can run");
  }
  if (!fits(launch.block, kMaxBlock) || volume(launch.block) > kMaxThreads) {
    return invalid_configuration("a block of " + text(launch.block) + " threads: 1 to " + text(kMaxBlock) +
                                 " can run, together up to " + std::to_string(kMaxThreads));
  }
  const size_t most = allowed_shared_bytes(launch.kernel);
  if (launch.shared_bytes > most) {
    return invalid_value(std::to_string(launch.shared_bytes) + " bytes of shared memory: the kernel may have " +
                         std::to_string(most) + ", and by cudaFuncSetAttribute up to " +
                         std::to_string(kMaxSharedBytes));
  }
  if (launch.parameter_bytes > kMaxParameterBytes) {
    return invalid_value(std::to_string(launch.parameter_bytes) + " bytes of kernel parameters: at most " +
                         std::to_string(kMaxParameterBytes) + " fit");
  }
  return {};
}

uint3 position(int64_t block, dim3 grid) {
  return {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
          static_cast<unsigned>(block / grid.x / grid.y)};
}

Fault run_block(const Launch& launch, const Order& order, int64_t turn) {
  const int64_t block = order.block(turn, volume(launch.grid));
  return BlockRunner::here().run(launch, order, position(block, launch.grid));
}

/// Runs the blocks until the first fault. Other threads of the processor help with what is left after a while.
Fault run_blocks(const Launch& launch, const Order& order) {
  using Clock = std::chrono::steady_clock;
  const int64_t blocks = volume(launch.grid);
  const auto help = Clock::now() + kAlone;
  int64_t alone = 0;
  for (; alone < blocks && (trace::kOn || alone == 0 || Clock::now() < help); ++alone) {
    if (Fault found = run_block(launch, order, alone); found.error != cudaSuccess) return found;
  }
  Fault fault;
  std::atomic<bool> stop{false};
#pragma omp parallel for schedule(dynamic) if (alone < blocks)
  for (int64_t turn = alone; turn < blocks; ++turn) {
    if (stop.load(std::memory_order_relaxed)) continue;
    Fault found = run_block(launch, order, turn);
    // Only the first to exchange gets past, so one thread writes.
    if (found.error != cudaSuccess && !stop.exchange(true)) fault = std::move(found);
  }
  return fault;
}

Fault run_or_refuse(const Launch& launch) {
  if (Fault refused = refusal(launch); refused.error != cudaSuccess) return refused;
  const auto order = Order::from_environment();
  if (!order) {
    return invalid_value(std::string("FISHER_KERNELS_HOST_ORDER is \"") + std::getenv("FISHER_KERNELS_HOST_ORDER") +
                         "\", neither forward nor reverse nor a number");
  }
  return run_blocks(launch, *order);
}

/// Adds a kernel after its first launch to the file that FISHER_KERNELS_HOST_LAUNCHES names: its place in its module,
/// and the module.
void note(const void* kernel) {
  static const char* const path = std::getenv("FISHER_KERNELS_HOST_LAUNCHES");
  if (path == nullptr) return;
  static std::mutex mutex;
  static std::set<const void*> noted;
  const std::lock_guard lock(mutex);
  Dl_info module;
  if (!noted.insert(kernel).second || dladdr(kernel, &module) == 0) return;
  const auto place = static_cast<const char*>(kernel) - static_cast<const char*>(module.dli_fbase);
  std::ofstream(path, std::ios::app) << std::hex << place << ' ' << module.dli_fname << std::endl;
}

}  // namespace

cudaError_t run(const Launch& launch) {
  if (active_runner != nullptr) active_runner->refuse_launch();
  {
    const trace::Launching traced(launch);
    last = run_or_refuse(launch);
  }
  if (last.error == cudaSuccess) note(launch.kernel);
  set_last_error(last.error);
  return last.error;
}

const std::string& last_message() { return last.message; }

const char* explanation(cudaError_t error) {
  return last.error == error && !last.message.empty() ? last.message.c_str() : nullptr;
}

}  // namespace fisher_kernels::on_host
