"""Hosts other than diffusers: thin adapters on the same core."""
