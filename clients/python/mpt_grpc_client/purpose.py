"""What a channel is for, which selects the options that gRPC gets for it."""

from __future__ import annotations

import json
from enum import Enum, auto

from mpt_grpc_client.targets import is_local
from mpt_grpc_client.version import __version__

_MAX_MESSAGE_BYTES = 32 * 1024 * 1024
"""The maximum size of one message, in either direction."""


class Purpose(Enum):
    """What a channel is for."""

    RETRIED = auto()
    """Calls to one server, which gRPC tries again."""
    SINGLE = auto()
    """Calls to one server, each of which is tried once."""
    BALANCED = auto()
    """Calls to one of several servers; the client's own code goes on at another one."""
    EVERY = auto()
    """A call to every server, also those that drain, each of which is tried once."""

    @classmethod
    def of_calls(cls, *, balanced: bool, retries: bool) -> Purpose:
        """Returns the purpose of the channels of a client."""
        if balanced:
            return cls.BALANCED
        return cls.RETRIED if retries else cls.SINGLE


_SERVICE_CONFIGS = {
    Purpose.BALANCED: {
        # A server that drains or stalls gets no calls, and neither does an address of the target that does not respond.
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "mpt.v1.TextGenerationService"},
    },
    Purpose.RETRIED: {
        "methodConfig": [
            {
                "name": [{"service": "mpt.v1.TextGenerationService"}],
                # gRPC retries a call only until its headers arrive, so a stream that has begun is never replayed. The
                # server's grpc-retry-pushback-ms replaces the backoff.
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ]
    },
}


_QUICK_DETECTION = (
    # How long gRPC waits for the answers to its other pings, and for a connection: by default 60 s and 20 s.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
)
"""How soon a stream notices that its server's machine has vanished, and goes on elsewhere."""


def channel_options(target: str, purpose: Purpose) -> tuple[tuple[str, str | int], ...]:
    """Returns the options of a channel to this target."""
    has_others = purpose in (Purpose.BALANCED, Purpose.EVERY)
    return (
        # gRPC would send calls to this machine through a proxy too, unless no_proxy lists them.
        ("grpc.enable_http_proxy", int(not is_local(target))),
        ("grpc.primary_user_agent", f"mpt-grpc-client/{__version__}"),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.service_config", json.dumps(_SERVICE_CONFIGS.get(purpose, {}))),
        ("grpc.enable_retries", int(purpose is Purpose.RETRIED)),
        # A call is retried only if this buffer can hold it; the default of 256 KiB would exclude long prompts.
        ("grpc.per_rpc_retry_buffer_size", _MAX_MESSAGE_BYTES),
        # By default gRPC takes up to two minutes to notice that a server is back.
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Of a name; by default, a change is noticed half a minute late.
        ("grpc.dns_min_time_between_resolutions_ms", 500),
        ("grpc.keepalive_time_ms", 10_000 if has_others else 30_000),
        ("grpc.keepalive_timeout_ms", 5_000 if has_others else 10_000),
        *(_QUICK_DETECTION if has_others else ()),
        # Without this, pings stop during a long unary call, and a server that has vanished goes unnoticed.
        ("grpc.http2.max_pings_without_data", 0),
    )
