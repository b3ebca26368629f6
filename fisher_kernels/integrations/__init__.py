"""Adapters for the programs that people train with; each module imports its framework, and nothing imports it unasked.

- ``fisher_kernels.integrations.transformers``: the Trainer of Hugging Face.
- ``fisher_kernels.integrations.lightning``: Lightning's Trainer and Fabric.
- ``fisher_kernels.integrations.accelerate``: Accelerate, where it shards.
- ``fisher_kernels.integrations.figures``: figures of optimizers for loggers and files; it imports no framework.
"""
