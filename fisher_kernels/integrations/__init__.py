"""Adapters for the programs that people train with; each module imports its framework, and nothing imports it unasked.

- ``fisher_kernels.integrations.transformers``: the Trainer of Hugging Face.
- ``fisher_kernels.integrations.lightning``: Lightning's Trainer and Fabric.
"""
