"""Fisher-information optimizers for PyTorch, on hand-written kernels."""
