"""mpt-grpc: serves the MPT family of language models over gRPC."""
