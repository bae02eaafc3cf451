"""Benchmarks of hpcsgd beside MPI, gloo and DDP, and beside the limit of the hardware."""
