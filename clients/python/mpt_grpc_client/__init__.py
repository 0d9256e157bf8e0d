"""The Python client of mpt-grpc: `Client`, its asyncio equivalent `AsyncClient`, and the values they take and
return."""

from mpt_grpc_client.async_client import AsyncClient, AsyncTextStream
from mpt_grpc_client.client import Client, TextStream
from mpt_grpc_client.constraints import Choice, Constraint, JsonObject, JsonSchema, LarkGrammar, Regex
from mpt_grpc_client.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    InvalidTargetError,
    MptGrpcError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from mpt_grpc_client.prompts import Message, Prompt, Role
from mpt_grpc_client.request import GenerateOptions, RepetitionGuard
from mpt_grpc_client.results import (
    Delta,
    Finish,
    FinishReason,
    Generation,
    GenerationDefaults,
    Limits,
    Load,
    ModelInfo,
    Output,
    Resumption,
    ServerInfo,
    Timings,
    Token,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mpt_grpc_client.version import __version__

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncTextStream",
    "Choice",
    "Client",
    "Constraint",
    "DeadlineExceededError",
    "Delta",
    "FieldViolation",
    "Finish",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "GenerationDefaults",
    "InternalError",
    "InvalidRequestError",
    "InvalidTargetError",
    "JsonObject",
    "JsonSchema",
    "LarkGrammar",
    "Limits",
    "Load",
    "Message",
    "ModelInfo",
    "MptGrpcError",
    "NotFoundError",
    "Output",
    "OverloadedError",
    "Prompt",
    "Regex",
    "RepetitionGuard",
    "Resumption",
    "Role",
    "ServerInfo",
    "TextStream",
    "Timings",
    "Token",
    "TokenLogprob",
    "TopLogprob",
    "UnavailableError",
    "Usage",
    "__version__",
]
