"""Triton kernels and the functions that launch them. Arithmetic is in float32 after loading."""
