"""Benchmarks: the real programs, timed side by side with a peer in one run. Owns no part of what it times."""
