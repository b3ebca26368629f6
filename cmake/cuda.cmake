# Whether the CUDA kernels are compiled, and for which GPUs: sets `architectures_text`, or `why_no_cuda` where they are not.

set(oldest 80)            # that the kernels are written for
set(oldest_toolkit 12.1)  # whose kernels take 32 KB of parameters: lists of tensors are some

if(NOT FISHER_KERNELS_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "FISHER_KERNELS_CUDA is '${FISHER_KERNELS_CUDA}', expected 'auto', 'on' or 'off'")
endif()
string(REPLACE "," ";" architectures "${FISHER_KERNELS_CUDA_ARCHS}")
foreach(architecture IN LISTS architectures)
  if(NOT architecture MATCHES "^[0-9][0-9]+[af]?$")
    message(FATAL_ERROR
      "FISHER_KERNELS_CUDA_ARCHS is '${FISHER_KERNELS_CUDA_ARCHS}', expected compute capabilities: '80,90,100'")
  endif()
endforeach()
set(why_no_cuda "")

# The compute capabilities of the GPUs of this machine that the kernels are for, or why there is none.
function(find_gpus result why)
  set(${result} "" PARENT_SCOPE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/gpus.py"
    OUTPUT_VARIABLE found ERROR_VARIABLE failure OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE
    TIMEOUT 60)
  set(gpus ${found})
  list(FILTER gpus EXCLUDE REGEX "^[1-7][0-9]$")  # older than the oldest
  if(gpus)
    set(${result} ${gpus} PARENT_SCOPE)
  elseif(found)
    string(REPLACE ";" ", " found "${found}")
    set(${why} "no GPU of compute capability ${oldest} or newer was there at build time, only ${found}" PARENT_SCOPE)
  else()
    set(${why} "there was no NVIDIA GPU at build time${failure}" PARENT_SCOPE)
  endif()
endfunction()

# What an nvcc lacks, empty where it lacks nothing or does not say: that it works is seen later.
function(find_what_nvcc_lacks result)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
  if(NOT nvcc)
    separate_arguments(nvcc NATIVE_COMMAND "$ENV{CUDACXX}")
  endif()
  set(${result} "" PARENT_SCOPE)
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE text ERROR_QUIET)
  if(text MATCHES "release ([0-9]+[.][0-9]+)" AND CMAKE_MATCH_1 VERSION_LESS oldest_toolkit)
    set(${result} "nvcc (${nvcc}) is that of CUDA ${CMAKE_MATCH_1}, expected ${oldest_toolkit} or newer, since when \
kernels take 32 KB of parameters; CUDACXX or CUDA_HOME names another" PARENT_SCOPE)
  endif()
endfunction()

# An nvcc that is older than a GPU compiles for the newest one it knows before that: the GPU runs this, or its PTX.
function(keep_to_known_architectures list)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  set(kept "")
  foreach(gpu ${${list}})
    set(best ${gpu})
    if(known AND NOT gpu IN_LIST known)
      set(best ${oldest})
      foreach(each ${known})
        if(each GREATER best AND each LESS gpu)
          set(best ${each})
        endif()
      endforeach()
    endif()
    list(APPEND kept ${best})
  endforeach()
  list(REMOVE_DUPLICATES kept)
  set(${list} ${kept} PARENT_SCOPE)
endfunction()

set(are_of_this_machine OFF)
if(FISHER_KERNELS_CUDA STREQUAL off)
  set(why_no_cuda "FISHER_KERNELS_CUDA was off")
elseif(NOT architectures AND FISHER_KERNELS_CUDA STREQUAL on)
  set(architectures 80 90 100)
elseif(NOT architectures)
  find_gpus(architectures why_no_cuda)
  set(are_of_this_machine ON)
endif()

if(NOT why_no_cuda)
  # A compiler that was named is taken as it is; CMake itself does not look at CUDA_HOME.
  if(NOT CMAKE_CUDA_COMPILER AND "$ENV{CUDACXX}" STREQUAL "")
    find_program(FISHER_KERNELS_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin NO_CMAKE_SYSTEM_PATH)
    set(CMAKE_CUDA_COMPILER "${FISHER_KERNELS_NVCC}")
  endif()
  find_what_nvcc_lacks(why_no_cuda)
  if(why_no_cuda AND FISHER_KERNELS_CUDA STREQUAL on)
    message(FATAL_ERROR "FISHER_KERNELS_CUDA is 'on', but ${why_no_cuda}")
  endif()
endif()

if(NOT why_no_cuda)
  if(are_of_this_machine AND CMAKE_CUDA_COMPILER)
    keep_to_known_architectures(architectures)
  endif()
  list(SORT architectures COMPARE NATURAL)
  list(JOIN architectures "," architectures_text)
  list(GET architectures -1 newest)
  list(TRANSFORM architectures APPEND -real)
  set(CMAKE_CUDA_ARCHITECTURES ${architectures} ${newest}-virtual)
endif()

# Turns CUDA on, where all that is left to be seen is whether nvcc works.
macro(enable_cuda)
  if(NOT CMAKE_CUDA_COMPILER MATCHES "-NOTFOUND$")
    include(CheckLanguage)
    check_language(CUDA)
  endif()
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    message(STATUS "CUDA kernels: compute capabilities ${architectures_text}, by ${CMAKE_CUDA_COMPILER}")
  elseif(FISHER_KERNELS_CUDA STREQUAL on)
    message(FATAL_ERROR
      "FISHER_KERNELS_CUDA is 'on', but no nvcc that works was found: looked at CUDACXX ('$ENV{CUDACXX}'), "
      "CUDA_HOME ('$ENV{CUDA_HOME}') and PATH ('$ENV{PATH}')")
  else()
    set(why_no_cuda "no nvcc that works was in CUDACXX, CUDA_HOME or PATH at build time, which GPUs of compute capability \
${architectures_text} need (it comes with the CUDA toolkit)")
  endif()
endmacro()
