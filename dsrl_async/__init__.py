"""Asynchronous Diffusion Steering via Reinforcement Learning (DSRL) for flow-matching robot policies."""

__version__ = "0.1.0"
