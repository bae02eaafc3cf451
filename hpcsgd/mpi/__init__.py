"""The ranks of a job: world, communicators, communication thread, deadlines; the only user of mpi4py."""
