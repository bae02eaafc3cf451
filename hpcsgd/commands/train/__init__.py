"""`hpcsgd train`."""
