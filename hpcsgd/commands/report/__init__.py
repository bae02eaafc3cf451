"""`hpcsgd report`: compares runs as a table, figures and an HTML page."""
