#pragma once

// How the tests call what is compiled here.

#include <cuda_runtime.h>

#include <cstdint>

#define EXPORTED extern "C" __attribute__((visibility("default")))

using fisher_kernels::on_host::launch;
using fisher_kernels::on_host::shared_memory;

constexpr unsigned kAllLanes = 0xffffffffu;
