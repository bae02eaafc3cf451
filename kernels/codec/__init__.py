"""Kernels of the compression schemes: quantise, rotate and sample; one specification for host and GPU."""
