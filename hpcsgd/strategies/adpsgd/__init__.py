"""AD-PSGD (arXiv 1710.06952): asynchronous averages of pairs."""
