"""MPI-native, communication-efficient distributed SGD for PyTorch."""
