"""Servers that something else places, scales and restarts."""
