"""`hpcsgd tune`: searches for the best value of an option."""
