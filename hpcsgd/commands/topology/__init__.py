"""`hpcsgd topology`: tables and drawings of topologies."""
