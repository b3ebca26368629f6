"""Benchmarks of the kernels on a GPU: ``python -m bench.gpu`` builds, proves and measures, all in ten minutes."""
