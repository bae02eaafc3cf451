"""`hpcsgd bench compress`."""
