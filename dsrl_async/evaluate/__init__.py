"""Plays episodes with the frozen policy or a trained one, and reports success rates."""
