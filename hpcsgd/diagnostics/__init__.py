"""Traffic counters, activity records, traces, process states and stack dumps; no MPI."""
