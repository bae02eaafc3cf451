"""TELEPORTATION (arXiv 2501.15259): a few active nodes gossip, all take turns."""
