"""The gRPC service: the API's messages to the engine's values and back, health, errors, tracing, drain."""
