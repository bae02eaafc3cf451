"""TELEPORTATION (arXiv 2501.15259): a few active peers average, and their models move to other peers."""
