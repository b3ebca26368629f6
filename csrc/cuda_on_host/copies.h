#pragma once

// Asynchronous copies to shared memory. They arrive when their thread waits for them and not before, so that what reads
// too early, or waits for too few, finds what was there.

#include <cstddef>
#include <vector>

namespace fisher_kernels::on_host {

/// As cp.async: begins a copy of 4, 8 or 16 bytes between addresses that are multiples of so many.
void begin_copy(void* to_shared, const void* from, int bytes);

/// As cp.async.commit_group: ends a group of the running thread's copies.
void end_copies();

/// As cp.async.wait_group: waits until no more than so many of the thread's last groups are under way.
void wait_for_copies(int groups);

/// What one thread has under way.
struct Copies {
  struct Copy {
    void* to;
    const void* from;
    int bytes;
    const void* place;  // in the code of the kernel
  };

  std::vector<Copy> copies;
  std::vector<size_t> ends;  // of groups, as numbers of copies

  void clear();
  void wait(size_t groups);
};

}  // namespace fisher_kernels::on_host
