"""The adapter product on a GPU, by Triton kernels."""
