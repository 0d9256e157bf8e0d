"""OpenAI's HTTP API in front of the gRPC API, of which it is a client like any other."""
