"""PS/MPI (arXiv 1801.03855): parameter servers and MPI groups in one job, or as separate jobs."""
