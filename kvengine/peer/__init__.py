"""Blocks of other processes: what they say to each other, and who answers."""
