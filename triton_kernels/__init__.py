"""Triton kernels of fisher_kernels, importable only as ``fisher_kernels.triton_kernels``."""

if __name__ != "fisher_kernels.triton_kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; install fisher_kernels and import 'fisher_kernels.triton_kernels' "
        "(another distribution owns the top-level name triton_kernels; to import that one, leave this folder's parent "
        "off sys.path)"
    )
