"""Which of several servers a generation goes to: one that probably has the beginning of its prompt in its prefix cache,
or a less busy one.

All clients prefer the same server for the same beginning, without an exchange: rendezvous hashing with bounded loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

BEGINNING_BYTES = 512
"""How much of a text or a message counts, and how long a prompt must be for its place to matter: about 128 tokens."""
_BEGINNING_TOKENS = 128
_LOAD_FACTOR, _FREE_LOAD = 1.1, 4
"""A server is skipped while it has more calls than `_FREE_LOAD`, and than `_LOAD_FACTOR` times the mean."""


def beginning(request: pb.GenerateRequest) -> bytes:
    """Returns the same bytes for prompts that begin alike; none for one that is short or not to be in a prefix cache.

    All turns of a conversation begin alike: with its messages up to the user's first.
    """
    if request.cache.bypass:
        return b""
    parts: list[bytes] = []
    if request.HasField("conversation"):
        if request.conversation.ByteSize() < BEGINNING_BYTES:
            return b""
        for message in request.conversation.messages:
            parts.append(message.content[:BEGINNING_BYTES].encode()[:BEGINNING_BYTES])
            if message.role == pb.ROLE_USER:
                break
    elif request.HasField("token_ids"):
        if len(request.token_ids.ids) < _BEGINNING_TOKENS:
            return b""
        parts.append(repr(request.token_ids.ids[:_BEGINNING_TOKENS]).encode())
    else:
        parts.append(request.text[:BEGINNING_BYTES].encode()[:BEGINNING_BYTES])
        if len(parts[0]) < BEGINNING_BYTES:
            return b""
    parts.append(request.cache.salt.encode())
    return b"".join(blake2b(part, digest_size=16).digest() for part in parts)


def order(beginning: bytes, targets: Sequence[str], loads: Sequence[int], turn: int) -> list[int]:
    """Returns the indexes of the servers in the order in which a call is to try them.

    beginning: that of the prompt; if empty, the least busy server is first, and equally busy ones take turns.
    loads: the number of calls in progress on each server.
    turn: the index of the server whose turn it is.
    """
    indexes = range(len(targets))
    if not beginning:
        return sorted(indexes, key=lambda index: (loads[index], (index - turn) % len(targets)))
    limit = max(_FREE_LOAD, _LOAD_FACTOR * sum(loads) / len(loads))
    return sorted(indexes, key=lambda index: (loads[index] > limit, _weight(beginning, targets[index])))


def _weight(beginning: bytes, target: str) -> bytes:
    return blake2b(target.encode(), key=blake2b(beginning, digest_size=32).digest(), digest_size=16).digest()
