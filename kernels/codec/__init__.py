"""Kernels of the compression schemes (quantise, rotate, sample), with one specification for host and GPU."""
