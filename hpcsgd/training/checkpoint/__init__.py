"""Checkpoints, in files and in memory."""
