"""Triton kernels of ttaq."""
