"""The options of gRPC's server: sizes, how many calls may be pending, and pings."""

from __future__ import annotations

import math

from mpt_grpc.settings import Settings

_MAX_PENDING_CALLS = 100_000
_MAX_INT = (1 << 31) - 1
_MAX_RECEIVED_BYTES = 8 << 20
"""The largest message that is received; smaller ones that are still too large get an error with details."""
_MAX_SENT_BYTES = 32 << 20
_CHANNEL_OPTIONS = (
    # Otherwise a second server could silently share the port.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_RECEIVED_BYTES),
    ("grpc.max_send_message_length", _MAX_SENT_BYTES),
    # Calls beyond what the queue holds are refused by this server, with the time to wait, not dropped by gRPC.
    ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
    ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
    # gRPC would end calls with CANCELLED that this process, starved of processors, has not begun within 30 s.
    ("grpc.server_max_unrequested_time_in_server", _MAX_INT),
    # Ends the calls of a client whose machine has vanished.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Allow clients to ping during long calls.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    ("grpc.http2.max_ping_strikes", 0),
)


def channel_options(settings: Settings) -> tuple[tuple[str, int], ...]:
    """Returns the options of gRPC's server."""
    options = [*_CHANNEL_OPTIONS, ("grpc.enable_channelz", int(settings.telemetry.channelz_port is not None))]
    if (age_s := settings.server.max_connection_age_s) is not None:
        options.append(("grpc.max_connection_age_ms", min(math.ceil(1000 * age_s), _MAX_INT)))
    return tuple(options)
