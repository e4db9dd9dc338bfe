"""Adapters on a GPU, by Triton kernels. Importing it needs Triton."""
