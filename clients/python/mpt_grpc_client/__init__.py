"""The Python client of mpt-grpc."""
