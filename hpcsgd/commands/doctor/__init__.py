"""`hpcsgd doctor`: checks of the installation and the cluster."""
