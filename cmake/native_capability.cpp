#include <cstdio>

#include "../csrc/common/processor.h"

/// Prints the best instruction set of this processor, for FISHER_KERNELS_CPU=native.
int main() { std::fputs(fisher_kernels::processor_capabilities().back().c_str(), stdout); }
