"""The Python client of mpt-grpc: `Client` and its asyncio twin `AsyncClient`, and the values they give and take."""

from mpt_grpc_client.async_client import AsyncClient, AsyncTextStream
from mpt_grpc_client.client import Client, TextStream
from mpt_grpc_client.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    MptGrpcError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from mpt_grpc_client.request import GenerateOptions
from mpt_grpc_client.results import (
    Finish,
    FinishReason,
    Generation,
    Limits,
    Load,
    ModelInfo,
    ServerInfo,
    Timings,
    Token,
    Usage,
)

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncTextStream",
    "Client",
    "DeadlineExceededError",
    "FieldViolation",
    "Finish",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "InternalError",
    "InvalidRequestError",
    "Limits",
    "Load",
    "ModelInfo",
    "MptGrpcError",
    "NotFoundError",
    "OverloadedError",
    "ServerInfo",
    "TextStream",
    "Timings",
    "Token",
    "UnavailableError",
    "Usage",
]
