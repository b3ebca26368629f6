#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "../kernels.h"

namespace fisher_kernels {

/// Position in `capability_names()` of the instruction set in use: the best of this processor, or what
/// `set_capability` chose last.
int current_capability();

/// Names of the instruction sets that the kernels were compiled for and this processor has, the plainest first.
std::vector<std::string> capability_names();

/// ValueError if `name` is not among `capability_names()`.
void set_capability(const std::string& name);

/// Runs the variant of a kernel that was compiled for the current capability:
///   run(arguments, {FISHER_KERNELS_VARIANTS(minmax)});
template <class Arguments>
void run(const Arguments& arguments, std::initializer_list<void (*)(const Arguments&)> variants) {
  variants.begin()[current_capability()](arguments);
}

}  // namespace fisher_kernels

// In the order of capability_names().
#ifdef FISHER_KERNELS_X86
#define FISHER_KERNELS_VARIANTS(kernel) baseline::kernel, avx2::kernel, avx512::kernel
#else
#define FISHER_KERNELS_VARIANTS(kernel) baseline::kernel
#endif
