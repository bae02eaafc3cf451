"""`hpcsgd serve`."""
