"""`Run`, its batches and virtual nodes; checkpoints, data sets and models."""
