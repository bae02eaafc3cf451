"""Tensor groups: many tensors in one flat buffer, cut in buckets; gradient hooks; weighted sums."""
