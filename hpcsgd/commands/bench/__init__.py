"""Benchmarks against MPI's all-reduce, gloo and DDP, and against what the hardware allows."""
