# Which instruction sets the CPU kernels are compiled for: sets `capabilities`, the plainest first, and flags and a macro
# for each.

set(capability_macro_avx2 FISHER_KERNELS_HAS_AVX2)
set(capability_macro_avx512 FISHER_KERNELS_HAS_AVX512)
set(capability_flags_avx2 -mavx2 -mfma -mf16c)
set(capability_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)

include(CheckCXXSourceCompiles)
check_cxx_source_compiles("
  #ifndef __x86_64__
  #error
  #endif
  int main() {}" FISHER_KERNELS_X86_64)
set(known baseline)
if(FISHER_KERNELS_X86_64)
  list(APPEND known avx2 avx512)
endif()

# The best instruction set of this processor: asked at every configuration, for a build folder may have moved.
function(find_native_capability result)
  set(${result} baseline PARENT_SCOPE)
  if(CMAKE_CROSSCOMPILING)
    return()
  endif()
  foreach(variable status compiled)
    unset(native_capability_${variable} CACHE)
  endforeach()
  try_run(native_capability_status native_capability_compiled
    ${CMAKE_BINARY_DIR}/native_capability ${CMAKE_SOURCE_DIR}/cmake/native_capability.cpp RUN_OUTPUT_VARIABLE output)
  if(NOT native_capability_status STREQUAL 0)
    message(FATAL_ERROR "cmake/native_capability.cpp, which asks this processor for its instruction sets, does not run; "
      "FISHER_KERNELS_CPU=baseline, all or a list asks for none")
  endif()
  set(${result} ${output} PARENT_SCOPE)
endfunction()

if(FISHER_KERNELS_CPU STREQUAL native)
  find_native_capability(wanted)
elseif(FISHER_KERNELS_CPU STREQUAL all)
  set(wanted ${known})
else()
  string(REPLACE "," ";" wanted "${FISHER_KERNELS_CPU}")
  foreach(capability IN LISTS wanted)
    if(NOT capability IN_LIST known)
      list(JOIN known ", " known_text)
      message(FATAL_ERROR "FISHER_KERNELS_CPU is '${FISHER_KERNELS_CPU}', expected 'native', 'all' or a list of: ${known_text}")
    endif()
  endforeach()
endif()
# The baseline is always there: it runs everywhere.
set(capabilities baseline)
foreach(capability avx2 avx512)
  if(capability IN_LIST wanted)
    list(APPEND capabilities ${capability})
  endif()
endforeach()
if(FISHER_KERNELS_CPU STREQUAL native AND NOT capabilities STREQUAL baseline)
  # This processor has better, and the baseline is there in case the module moves: it need not be fast, but soon compiled.
  set(capability_flags_baseline -O1)
endif()
list(JOIN capabilities ", " capabilities_text)
message(STATUS "CPU kernels: ${capabilities_text} (FISHER_KERNELS_CPU=${FISHER_KERNELS_CPU})")
