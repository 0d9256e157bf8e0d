"""Serializes responses for callers over a connection: those with many log probabilities in a thread, and in pieces.

Protobuf holds Python's global lock while it serializes a message, so a thread alone would still stop all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from google.protobuf.message import Message

from mpt_grpc.server.call import current_call

_MANY_TO_SERIALIZE = 512
"""The number of log probabilities, with alternatives, that are serialized in half a millisecond."""
_LOGPROB_DEPTH = 2
"""Log probabilities are in an output or a prompt, which is in the response."""
_LENGTH_DELIMITED = 2


async def encoded(serialize: Callable[[Message], bytes] | None, response: Message) -> Message | bytes:
    """Returns the bytes of the current call's response, which may empty it, or without a serializer the response."""
    if serialize is None:
        return response
    if current_call().num_logprobs <= _MANY_TO_SERIALIZE:
        return serialize(response)
    return await asyncio.to_thread(in_pieces, response, _LOGPROB_DEPTH)


def in_pieces(message: Message, depth: int) -> bytes:
    """Serializes and empties a message without maps. The messages that are `depth` levels below are the pieces."""
    if not depth:
        return message.SerializeToString()
    pieces = list[bytes]()
    for field, value in message.ListFields():
        if field.message_type is not None:
            tag = _varint(field.number << 3 | _LENGTH_DELIMITED)
            for submessage in (value,) if field.has_presence else value:
                piece = in_pieces(submessage, depth - 1)
                pieces += tag, _varint(len(piece)), piece
            message.ClearField(field.name)
    return b"".join((message.SerializeToString(), *pieces))


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
