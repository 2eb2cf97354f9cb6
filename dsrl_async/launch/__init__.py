"""Trains: steers a frozen flow-matching policy with DSRL, asynchronously."""
