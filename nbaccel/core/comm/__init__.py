"""Ranks exchanging tensors and objects: each exchange begins with a small message that finds a mismatch."""
