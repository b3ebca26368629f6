# Finds nvcc, and compiles CUDA kernels for GPUs that need not be here, or for the CPU.

if(NOT FISHER_KERNELS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "FISHER_KERNELS_CUDA is '${FISHER_KERNELS_CUDA}', expected 'auto', 'on' or 'off'")
endif()

set(FISHER_KERNELS_HAS_CUDA OFF)
if(NOT FISHER_KERNELS_CUDA STREQUAL off)
  # A compiler that was named is taken as it is; CMake itself does not look at CUDA_HOME.
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    find_program(FISHER_KERNELS_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
    if(FISHER_KERNELS_NVCC)
      set(CMAKE_CUDA_COMPILER "${FISHER_KERNELS_NVCC}")
    endif()
  endif()
  string(REGEX MATCHALL "[0-9]+[af]?" architectures "${FISHER_KERNELS_CUDA_ARCHS}")
  list(JOIN architectures "," understood)
  string(REPLACE ";" "," given "${FISHER_KERNELS_CUDA_ARCHS}")
  if(NOT architectures OR NOT understood STREQUAL given)
    message(FATAL_ERROR
      "FISHER_KERNELS_CUDA_ARCHS is '${FISHER_KERNELS_CUDA_ARCHS}', expected compute capabilities such as '80,90,100'")
  endif()
  list(SORT architectures COMPARE NATURAL)
  list(GET architectures -1 newest)
  list(TRANSFORM architectures APPEND -real)
  set(CMAKE_CUDA_ARCHITECTURES ${architectures} ${newest}-virtual)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(FISHER_KERNELS_HAS_CUDA ON)
  elseif(FISHER_KERNELS_CUDA STREQUAL on)
    message(FATAL_ERROR
      "FISHER_KERNELS_CUDA is 'on', but no nvcc that works was found: looked at CUDACXX ('$ENV{CUDACXX}'), "
      "CUDA_HOME ('$ENV{CUDA_HOME}') and PATH ('$ENV{PATH}')")
  else()
    message(STATUS "No nvcc in CUDACXX, CUDA_HOME or PATH: the CUDA kernels are left out")
  endif()
endif()

# The toolkit's headers are what kernels see; neither Python nor torch is.
function(add_cuda_kernels name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  target_compile_definitions(${name} PRIVATE FISHER_KERNELS_CUDA FISHER_KERNELS_CUDA_ARCHS="${understood}")
  set_target_properties(${name} PROPERTIES
    CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static)
  # Nothing that trades accuracy for speed.
  target_compile_options(${name} PRIVATE
    --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra
    $<$<BOOL:${FISHER_KERNELS_WERROR}>:--Werror=all-warnings -Xcompiler=-Werror>)
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(${name} PUBLIC CUDA::cudart_static)
endfunction()

# The same sources as C++, under a stand-in for the CUDA runtime that runs every thread of a kernel on the CPU.
function(add_cuda_kernels_on_host name)
  if(NOT FISHER_KERNELS_HAS_CUDA)
    message(FATAL_ERROR "FISHER_KERNELS_CUDA_ON_HOST needs the headers of a CUDA toolkit, and CUDA is not built")
  endif()
  find_package(CUDAToolkit REQUIRED)
  file(GLOB stand_in CONFIGURE_DEPENDS csrc/cuda_on_host/*.cpp)
  foreach(kernel ${ARGN})  # CMake knows one language for a file: another file includes it
    get_filename_component(stem ${kernel} NAME_WE)
    set(source ${CMAKE_CURRENT_BINARY_DIR}/cuda_on_host/${stem}.cpp)
    file(CONFIGURE OUTPUT ${source} CONTENT "#include \"cuda/${stem}.cu\"\n")
    list(APPEND sources ${source})
  endforeach()
  add_library(${name} OBJECT ${stand_in} ${sources})
  target_link_libraries(${name} PRIVATE common)
  target_include_directories(${name} BEFORE PRIVATE csrc/cuda_on_host)
  target_include_directories(${name} SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_options(${name} PRIVATE -Wno-unknown-pragmas)  # of unrolling
  target_compile_definitions(${name} PRIVATE FISHER_KERNELS_CUDA_ON_HOST FISHER_KERNELS_CUDA_ARCHS="host")
endfunction()
