"""Operators that have kernels."""
