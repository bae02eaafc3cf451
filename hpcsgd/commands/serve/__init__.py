"""`hpcsgd serve`: parameter servers as a job."""
