"""mpt-grpc: serves the MPT family of language models over gRPC."""

from importlib.metadata import version

__version__ = version("mpt-grpc")
