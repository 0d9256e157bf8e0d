"""The commands. All except `serve` are clients of a server and use only its API."""
