"""Sidecars to the hub and from it: `mergekit-fisher push` and `pull`."""
