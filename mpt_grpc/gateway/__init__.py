"""The OpenAI-compatible HTTP API and the web page: an ordinary client of the gRPC API."""
