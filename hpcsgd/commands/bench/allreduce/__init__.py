"""`hpcsgd bench allreduce`."""
