"""The domain's errors. grpc is not known here; `server/status.py` maps each class to a status.

MptGrpcError
├── ModelError            the model's files cannot be used: the server does not start
│   ├── ConfigError         config.json asks for something that is not implemented
│   └── WeightsError        a tensor is missing, extra, misshapen or unreadable
├── SettingsError         a flag or a setting is wrong: the server does not start
├── EvaluationError       `mpt-grpc eval` cannot measure
├── RequestError          the caller can mend it
│   ├── InvalidRequestError   names every bad field at once
│   ├── PromptRefusedError    a guard objects to the prompt
│   ├── DuplicateRequestError the request id is in flight
│   └── UnknownModelError     the request names a model that is not loaded
├── OverloadedError       the waiting queue is full; try again later
├── UnavailableError      the engine is draining or dead
├── DeviceLostError       the accelerator has failed for good: the engine stops
└── InternalError         a fault of the engine while it served this one request
"""

from __future__ import annotations

from dataclasses import dataclass


class MptGrpcError(Exception):
    """Every error that this package raises on purpose."""


class ModelError(MptGrpcError):
    """The model's files cannot be used."""


class ConfigError(ModelError):
    """config.json holds a value that is not implemented."""


class WeightsError(ModelError):
    """A checkpoint's tensors do not fit the model."""


class SettingsError(MptGrpcError):
    """A flag or a setting is wrong."""


class EvaluationError(MptGrpcError):
    """A model cannot be measured."""


class RequestError(MptGrpcError):
    """A request that its caller can mend."""


@dataclass(frozen=True)
class FieldViolation:
    """One bad field of a request: its path in the API and what to do about it."""

    field: str
    description: str


class InvalidRequestError(RequestError):
    """One or more fields are out of range; all of them are named."""

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class PromptRefusedError(RequestError):
    """A guard objects to the prompt."""


class DuplicateRequestError(RequestError):
    """The request id is in flight already."""


class UnknownModelError(RequestError):
    """The request names a model that is not loaded."""


class OverloadedError(MptGrpcError):
    """The waiting queue is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(MptGrpcError):
    """The engine takes no work: it is draining, or its thread has died."""


class DeviceLostError(MptGrpcError):
    """The accelerator has failed in a way that only a new process mends."""


class InternalError(MptGrpcError):
    """The engine failed while it served this one request."""
