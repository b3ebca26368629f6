"""Tests of fisher_kernels."""
