"""`hpcsgd topology`."""
