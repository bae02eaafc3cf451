"""`hpcsgd train`: training runs, their settings, folders and records."""
