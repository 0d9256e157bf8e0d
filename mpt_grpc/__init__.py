"""mpt-grpc: a gRPC server for the MPT family of language models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mpt-grpc")
except PackageNotFoundError:  # a checkout that is not installed, such as that of `make bench-gpu`
    __version__ = "0+checkout"
