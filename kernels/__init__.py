"""Compiled inner loops: host kernels in numba, GPU kernels in CUDA C++.

Importing a module of this package imports numba. The rest of hpcsgd therefore does so where a kernel is
first needed, never at import time.
"""
