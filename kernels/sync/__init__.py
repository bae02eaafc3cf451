"""Synchronisation in shared memory: barrier, ticket lock, versioned slots."""
