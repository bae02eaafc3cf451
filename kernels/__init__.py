"""The compiled inner loops: host kernels in numba, one module a purpose.

Importing a module here costs numba's import, so the rest of hpcsgd does it where a kernel is first
needed and never at import time.
"""
