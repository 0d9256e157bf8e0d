"""What every channel and call has in common, sync or async: the target, the options and the trace context."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version

from opentelemetry import propagate

from mpt_grpc_client.errors import InvalidTargetError

MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""Of one message, in either direction."""

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "mpt.v1.TextGenerationService"}],
            # gRPC retries a call only until its headers arrive, so a stream that has begun is never replayed. The
            # server's grpc-retry-pushback-ms takes the place of the backoff.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}


def resolve_target(target: str | None) -> str:
    """The target that was given, else that of MPT_GRPC_TARGET, else the server's default port on this machine.

    Raises InvalidTargetError for a URL and for a host without a port, which gRPC would look for elsewhere.
    """
    resolved = target or os.environ.get("MPT_GRPC_TARGET") or "localhost:50051"
    if resolved.startswith(("http:", "https:")) or not re.search("[:/]", resolved):
        raise InvalidTargetError(f"target: {resolved!r} is not HOST:PORT, as localhost:50051 is")
    return resolved


def channel_options(retries: bool) -> tuple[tuple[str, str | int], ...]:
    """The options of grpc.insecure_channel and of its twin in grpc.aio."""
    return (
        ("grpc.primary_user_agent", f"mpt-grpc-client/{version('mpt-grpc-client')}"),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", int(retries)),
        # A call is retried only if this buffer holds it; the default of 256 KiB would leave long prompts out.
        ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
        # gRPC would leave a server that comes back unnoticed for up to two minutes.
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # Without this the pings stop during a long unary call, and a server that has vanished goes unnoticed.
        ("grpc.http2.max_pings_without_data", 0),
    )


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """The current trace context as metadata: `traceparent` for W3C, OpenTelemetry's default; empty without a span."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
