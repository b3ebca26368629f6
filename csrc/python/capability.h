#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "../kernels.h"
#include "place.h"

namespace fisher_kernels {

/// Position in `capability_names()` of the instruction set in use: the best of this processor, or what
/// `set_capability` chose last.
int current_capability();

/// Names of the instruction sets that the kernels were compiled for and this processor has, the plainest first.
std::vector<std::string> capability_names();

/// ValueError if `name` is not among `capability_names()`.
void set_capability(const std::string& name);

/// All variants of a kernel.
template <class Arguments>
struct Kernel {
  std::initializer_list<void (*)(const Arguments&)> cpu;  // in the order of capability_names()
  void (*cuda)(const Arguments&, const Stream&);          // or null
};

[[noreturn]] void refuse_cuda(const char* function);

/// Runs the variant of a kernel for the place of a call, on the CPU the one for the current capability:
///   run(call, arguments, FISHER_KERNELS_VARIANTS(minmax));
template <class Arguments>
void run(const Call& call, const Arguments& arguments, const Kernel<Arguments>& kernel) {
  if (!call.place.runs_cuda()) return kernel.cpu.begin()[current_capability()](arguments);
  if (kernel.cuda == nullptr) refuse_cuda(call.function);
  kernel.cuda(arguments, call.place.stream);
}

}  // namespace fisher_kernels

// Kernels of an instruction set that was not compiled are not there to be named.
#ifdef FISHER_KERNELS_HAS_AVX2
#define FISHER_KERNELS_AVX2(kernel) , avx2::kernel
#else
#define FISHER_KERNELS_AVX2(kernel)
#endif
#ifdef FISHER_KERNELS_HAS_AVX512
#define FISHER_KERNELS_AVX512(kernel) , avx512::kernel
#else
#define FISHER_KERNELS_AVX512(kernel)
#endif
#define FISHER_KERNELS_ALL_CPU(kernel) \
  { baseline::kernel FISHER_KERNELS_AVX2(kernel) FISHER_KERNELS_AVX512(kernel) }

#define FISHER_KERNELS_VARIANTS(kernel) {FISHER_KERNELS_ALL_CPU(kernel), cuda::kernel}
#define FISHER_KERNELS_CPU_ONLY(kernel) {FISHER_KERNELS_ALL_CPU(kernel), nullptr}
