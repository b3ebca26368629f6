# The CUDA sources as C++, under a stand-in for the CUDA runtime that runs every thread of a kernel on the CPU: modules for
# tests. Of a toolkit they need the headers only.

if(NOT FISHER_KERNELS_CUDA_ON_HOST MATCHES "^(ON|sanitized|traced|all)$")
  message(FATAL_ERROR
    "FISHER_KERNELS_CUDA_ON_HOST is '${FISHER_KERNELS_CUDA_ON_HOST}', expected 'OFF', 'ON', 'sanitized', "
    "'traced' or 'all'")
endif()

find_package(CUDAToolkit QUIET)
unset(FISHER_KERNELS_CUDA_HEADERS CACHE)
find_path(FISHER_KERNELS_CUDA_HEADERS cuda_bf16.h
  HINTS $ENV{CUDA_HOME}/include ${CUDAToolkit_INCLUDE_DIRS} /usr/local/cuda/include)

# A module, the flags that all of it is compiled and linked with, and those that the kernels alone are compiled with.
function(add_cuda_on_host name flags kernel_flags)
  foreach(kernel ${cuda_sources})  # CMake knows one language for a file: another file includes it
    get_filename_component(stem ${kernel} NAME_WE)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/cuda_on_host/${stem}.cpp)
    file(CONFIGURE OUTPUT ${source} CONTENT "#include \"cuda/${stem}.cu\"\n")
    list(APPEND sources ${source})
  endforeach()
  file(GLOB stand_in CONFIGURE_DEPENDS csrc/cuda_on_host/*.cpp)
  add_library(kernels${name} OBJECT ${sources})
  add_library(stand_in${name} OBJECT ${stand_in} ${ARGN})
  target_compile_options(kernels${name} PRIVATE ${kernel_flags})
  foreach(target kernels${name} stand_in${name})
    target_link_libraries(${target} PRIVATE common)
    target_include_directories(${target} BEFORE PRIVATE csrc/cuda_on_host)
    target_include_directories(${target} SYSTEM PRIVATE ${FISHER_KERNELS_CUDA_HEADERS})
    target_compile_definitions(${target} PRIVATE FISHER_KERNELS_CUDA_ON_HOST FISHER_KERNELS_CUDA_ARCHS="host")
    target_compile_options(${target} PRIVATE -Wno-unknown-pragmas ${flags})  # the pragmas unroll loops
  endforeach()
  add_module(${name} cpu kernels${name} stand_in${name})
  target_link_options(${name} PRIVATE ${flags})
endfunction()

if(FISHER_KERNELS_CUDA_HEADERS)
  add_cuda_on_host(_cuda_on_host -O2 "")
  if(FISHER_KERNELS_CUDA_ON_HOST MATCHES "^(sanitized|all)$")
    add_cuda_on_host(_cuda_on_host_sanitized "-O0;-fsanitize=address,undefined;-fno-sanitize-recover=undefined" "")
  endif()
  if(FISHER_KERNELS_CUDA_ON_HOST MATCHES "^(traced|all)$")
    # The kernels' accesses are told to the tracer in the place of libtsan, which is not linked; the stand-in's are its own.
    file(GLOB tracer CONFIGURE_DEPENDS csrc/cuda_on_host/trace/*.cpp)
    add_cuda_on_host(_cuda_on_host_traced "-O1;-g1;-DFISHER_KERNELS_HOST_TRACE" "-fsanitize=thread;-Wno-tsan" ${tracer})
  endif()
else()
  message(STATUS "The CUDA kernels need a toolkit's headers to run on the host: cuda_bf16.h is not in "
    "CUDA_HOME ('$ENV{CUDA_HOME}'), beside nvcc or in /usr/local/cuda")
endif()
