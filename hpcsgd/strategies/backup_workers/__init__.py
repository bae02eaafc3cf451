"""Dynamic backup workers, cb-DyBW (arXiv 2102.06280)."""
