"""Tensor groups (tensors in one flat buffer, divided into buckets), gradient hooks, weighted sums."""
