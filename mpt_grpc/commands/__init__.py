"""Commands that are clients of a server: they know its API and nothing of what is behind it."""
