"""The gRPC server: services, conversion of messages, errors as statuses, health and shutdown."""
