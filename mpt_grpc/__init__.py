"""mpt-grpc: a gRPC server for the MPT family of language models."""

from importlib.metadata import version

__version__ = version("mpt-grpc")
