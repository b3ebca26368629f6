# ccache or sccache where it is installed, unless CMAKE_<LANG>_COMPILER_LAUNCHER is set: empty is none.

unset(FISHER_KERNELS_COMPILER_CACHE CACHE)  # it may have gone since
find_program(FISHER_KERNELS_COMPILER_CACHE NAMES ccache sccache)
get_filename_component(compiler "${CMAKE_CXX_COMPILER}" REALPATH)
if(FISHER_KERNELS_COMPILER_CACHE AND NOT compiler MATCHES "ccache$")
  set(launcher ${FISHER_KERNELS_COMPILER_CACHE})
  if(launcher MATCHES "/ccache$" AND "$ENV{CCACHE_BASEDIR}" STREQUAL "")
    # Paths of the source tree count as relative ones, so that another checkout finds what this one compiled.
    set(launcher ${CMAKE_COMMAND} -E env CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} ${launcher})
  endif()
  foreach(language CXX CUDA)
    if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      set(CMAKE_${language}_COMPILER_LAUNCHER ${launcher})
    endif()
  endforeach()
endif()
