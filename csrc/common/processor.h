#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace fisher_kernels {

/// Names of the instruction sets of this processor that kernels can be compiled for, the plainest first.
inline std::vector<std::string> processor_capabilities() {
  std::vector<std::string> names{"baseline"};
#ifdef __x86_64__
  // These ask the operating system too whether it saves the wide registers. (f16c, which older compilers do not know
  // here, is older than avx2.)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) names.push_back("avx2");
  if (avx2 && avx512) names.push_back("avx512");
#endif
  return names;
}

/// Names of the instruction sets that the kernels were compiled for, likewise.
inline std::vector<std::string> built_capabilities() {
  return {"baseline",
#ifdef FISHER_KERNELS_HAS_AVX2
          "avx2",
#endif
#ifdef FISHER_KERNELS_HAS_AVX512
          "avx512",
#endif
  };
}

/// Those of `built` that a processor has which can do `here`. Each instruction set includes those ahead of it, so that
/// this is the beginning of `built`, and positions in it are those in `built`.
inline std::vector<std::string> usable_capabilities(std::vector<std::string> built, const std::vector<std::string>& here) {
  const auto is_missing = [&](const std::string& name) { return std::find(here.begin(), here.end(), name) == here.end(); };
  built.erase(std::find_if(built.begin(), built.end(), is_missing), built.end());
  return built;
}

}  // namespace fisher_kernels
