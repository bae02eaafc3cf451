"""LASGD (arXiv 2203.13085): averages of all models beside the training steps."""
