"""Kernels that add: a node's reduction, weighted sums, the server's update, the model's change."""
