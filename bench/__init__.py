"""Benches: `python -m bench NAME`. They share one runner and one row schema, see bench.runner."""
