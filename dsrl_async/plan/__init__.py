"""Predicts how throughput grows with the number of environment workers, and what bounds it."""
