"""Adapters: arrays in and out, and the serving frameworks. Each is imported by its own name."""
