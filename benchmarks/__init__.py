"""Benchmarks: the average beside its peers, in one run."""
