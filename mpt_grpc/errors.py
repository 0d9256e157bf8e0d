"""The server's exceptions. They do not depend on grpc; `server/status.py` maps them to gRPC statuses.

MptServerError
├── ModelError             the model cannot be loaded: the server does not start
│   ├── ConfigError          config.json or adapter_config.json has a value that is not supported
│   └── WeightsError         a tensor is missing, unexpected, misshapen or unreadable
├── SettingsError          a flag or a setting is invalid: the server does not start
├── EvaluationError        `mpt-grpc eval` cannot run
├── BenchmarkError         `mpt-grpc bench` cannot run, or no request succeeds
├── BatchError             `mpt-grpc batch` cannot run or continue, or a request of it fails
├── VerificationError      `mpt-grpc verify` finds a difference, or cannot run
├── RequestError           the caller can correct the request
│   ├── InvalidRequestError    lists every invalid field
│   ├── PromptRefusedError     a guard refused the prompt
│   ├── DuplicateRequestError  a request with this ID is in progress
│   ├── FingerprintError       an output is to be resumed that a different server began
│   └── UnknownModelError      the requested model is not loaded
├── UnauthenticatedError   the caller has no valid access token
├── PermissionDeniedError  the caller lacks a role
├── OverloadedError        the queue is full or the machine too busy; the caller can retry later
│   └── QuotaExceededError     the caller uses as much as it may
├── UnreadResponseError    the caller does not read a stream
├── UnavailableError       the engine accepts no requests
│   ├── DrainingError        the server is shutting down
│   └── EngineStoppedError   the engine has failed and the server must be restarted
├── DeviceLostError        the accelerator has failed permanently: the engine stops
└── InternalError          an internal failure while processing one request
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self


class MptServerError(Exception):
    """The base class of all errors that this package raises deliberately."""

    reason: ClassVar[str] = "ENGINE_FAULT"
    """The stable name of the error in the API, the metrics and the spans."""

    @property
    def logged(self) -> str:
        """What the log and the spans have of the error, which quotes no prompt."""
        return str(self)


class ModelError(MptServerError):
    """The model cannot be loaded."""


class ConfigError(ModelError):
    """config.json or adapter_config.json has a value that is not supported."""


class WeightsError(ModelError):
    """The tensors of a checkpoint or an adapter do not match the model."""


class SettingsError(MptServerError):
    """A flag or a setting is invalid."""


class EvaluationError(MptServerError):
    """An evaluation cannot run."""


class BenchmarkError(MptServerError):
    """A benchmark cannot run, or no request succeeds."""


class BatchError(MptServerError):
    """A batch cannot run or continue, or a request of it fails."""


class VerificationError(MptServerError):
    """A checkpoint is not served as a reference computes it, or cannot be verified."""


class RequestError(MptServerError):
    """A request that its caller can correct."""


@dataclass(frozen=True)
class FieldViolation:
    """An invalid field of a request: its path in the API, what is wrong with it and how to correct it."""

    field: str
    description: str
    reason: str = ""
    """A stable name for what is wrong, if programs may want to know it; empty otherwise."""
    logged: str = ""
    """What is wrong without quoting the prompt, for the log; empty if the description does not quote it."""


CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
"""The reason of a request whose prompt and output do not fit in the context."""


class InvalidRequestError(RequestError):
    """One or more fields of the request are invalid; all of them are listed."""

    reason = "INVALID_REQUEST"

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations

    @property
    def logged(self) -> str:
        return "; ".join(f"{v.field}: {v.logged or v.description}" for v in self.violations)


class PromptRefusedError(RequestError):
    """A guard refused the prompt."""

    reason = "PROMPT_REFUSED"


class DuplicateRequestError(RequestError):
    """A request with this ID is in progress."""

    reason = "DUPLICATE_REQUEST_ID"


class FingerprintError(RequestError):
    """An output is to be resumed that a server with another fingerprint began."""

    reason = "FINGERPRINT_MISMATCH"


class UnknownModelError(RequestError):
    """The requested model is not loaded."""

    reason = "UNKNOWN_MODEL"


class UnauthenticatedError(MptServerError):
    """The caller has no valid access token."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(MptServerError):
    """The caller lacks a role."""

    reason = "PERMISSION_DENIED"


class OverloadedError(MptServerError):
    """The queue is full, or the machine is too busy to check a new constraint."""

    reason = "OVERLOADED"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaExceededError(OverloadedError):
    """The caller uses as much as its quota allows."""

    reason = "QUOTA_EXCEEDED"

    def __init__(self, message: str, retry_after_s: float, caller: str, quota: str, limit: int) -> None:
        """quota: what is limited, 'requests' in progress or 'tokens' per minute, to `limit`."""
        super().__init__(message, retry_after_s)
        self.caller, self.quota, self.limit = caller, quota, limit


class UnreadResponseError(MptServerError):
    """The caller of a stream has not read it for too long."""

    reason = "NOT_READ"


class UnavailableError(MptServerError):
    """The engine accepts no requests."""

    def again(self) -> Self:
        """Returns the same error for another request: one that is raised gets a traceback, and with it a request."""
        return type(self)(str(self))


class DrainingError(UnavailableError):
    """The server is shutting down."""

    reason = "DRAINING"


class EngineStoppedError(UnavailableError):
    """The engine has failed and the server must be restarted."""

    reason = "ENGINE_STOPPED"


class DeviceLostError(MptServerError):
    """The accelerator has failed in a way that only a new process can recover from."""


class InternalError(MptServerError):
    """An internal failure while processing one request."""
