"""The Python client of mpt-grpc: `Client`, its asyncio equivalent `AsyncClient`, and the values they take and
return."""

from mpt_grpc_client.async_client import AsyncClient
from mpt_grpc_client.async_stream import AsyncTextStream
from mpt_grpc_client.channel import ConnectionOptions
from mpt_grpc_client.client import Client
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
    PermissionDeniedError,
    QuotaExceededError,
    UnauthenticatedError,
    UnavailableError,
)
from mpt_grpc_client.options import GenerateOptions, RepetitionGuard
from mpt_grpc_client.prompts import Message, Prompt, Role
from mpt_grpc_client.request import PreparedPrompt
from mpt_grpc_client.results import (
    Delta,
    Finish,
    FinishReason,
    Generation,
    Output,
    Resumption,
    Timings,
    Token,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from mpt_grpc_client.server_info import GenerationDefaults, Limits, Load, ModelInfo, ServerInfo
from mpt_grpc_client.stream import TextStream
from mpt_grpc_client.tools import Tool, ToolCall, ToolCallDelta
from mpt_grpc_client.version import __version__

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncTextStream",
    "Choice",
    "Client",
    "ConnectionOptions",
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
    "PermissionDeniedError",
    "PreparedPrompt",
    "Prompt",
    "QuotaExceededError",
    "Regex",
    "RepetitionGuard",
    "Resumption",
    "Role",
    "ServerInfo",
    "TextStream",
    "Timings",
    "Token",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "__version__",
]
