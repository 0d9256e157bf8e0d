"""Servers that another system places, scales and restarts."""
