"""The fields of serialized messages are counted as those of the parsed ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.server.wire import field_beyond
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb

REQUEST = pb.GenerateRequest.DESCRIPTOR
MANY = 10_000
UNKNOWN = [b"\x80\x20\xff\x01", b"\x85\x20" + b"\x08" * 4, b"\x81\x20" + b"\x08" * 8, b"\x82\x20\x02\x08\x08"]
"""A field that the message does not have, in each of the encodings: a varint, 4 bytes, 8 bytes and a text."""

ids = st.lists(st.sampled_from([0, 1, 127, 128, 300, (1 << 32) - 1])) | st.just([300] * 100)
messages = st.builds(
    pb.Message,
    role=st.sampled_from([pb.ROLE_UNSPECIFIED, pb.ROLE_USER]),
    content=st.sampled_from(["", "x", "x" * 128, "x" * 300]),
    tool_calls=st.lists(st.builds(pb.ToolCall, id=st.text(max_size=2), name=st.text(max_size=2)), max_size=3),
)
requests = st.builds(
    pb.GenerateRequest,
    request_id=st.text(max_size=2),
    priority=st.sampled_from([-1, 0, 127]),
    conversation=st.builds(pb.Conversation, messages=st.lists(messages, max_size=3), drop_oldest_turns=st.booleans()),
    sampling=st.builds(
        pb.SamplingParameters, temperature=st.floats(0, 1, width=32), seed=st.sampled_from([0, 127, 1 << 63])
    ),
    decoding=st.builds(
        pb.DecodingOptions, logit_bias=st.dictionaries(st.integers(0, 9), st.just(1), max_size=3), allowed_token_ids=ids
    ),
    resume_token_ids=ids,
    resume_outputs=st.lists(st.builds(pb.PartialOutput, index=st.integers(0, 9), token_ids=ids), max_size=3),
)


def fields(message: Message, path: str = "", item: str = "") -> Iterator[tuple[str, str, int]]:
    """Yields for each field of a message and of those within it its path, or that of the list whose item it is in, the
    path of its name in either case, and how many numbers it has."""
    for field, value in message.ListFields():
        name = path + field.name
        if field.is_packed:
            yield item or name, name, len(value)
        elif field.message_type is None:
            yield item or name, name, 0
        elif field.has_presence:
            yield item or name, name, 0
            yield from fields(value, f"{name}.", item)
        elif field.message_type.GetOptions().map_entry:
            yield from ((name, name, 0) for _ in range(3 * len(value)))  # the entry, its key and its value
        else:
            for one in value:
                yield item or name, name, 0
                yield from fields(one, f"{name}.", item or name)


@given(requests, st.lists(st.sampled_from(UNKNOWN), max_size=3))
def test_a_message_has_too_many_fields_from_the_first_beyond_the_limit_on(
    request: pb.GenerateRequest, unknown: list[bytes]
) -> None:
    data = request.SerializeToString() + b"".join(unknown)
    paths = [path for path, _, _ in fields(request)] + ["request"] * len(unknown)
    assert field_beyond(data, REQUEST, len(paths), MANY) is None
    for number, path in enumerate(paths):
        assert field_beyond(data, REQUEST, number, MANY) == path


@given(requests)
def test_a_message_has_too_many_numbers_from_the_first_list_beyond_the_limit_on(request: pb.GenerateRequest) -> None:
    data, num_numbers = request.SerializeToString(), 0
    for _, name, size in fields(request):
        for most in (num_numbers, num_numbers + size - 1) if size else ():
            assert field_beyond(data, REQUEST, MANY, most) == name
        num_numbers += size
    assert field_beyond(data, REQUEST, MANY, num_numbers) is None


@given(requests, st.data())
def test_a_message_that_ends_within_a_field_may_be_refused_and_one_that_is_valid_is_not(
    request: pb.GenerateRequest, data: st.DataObject
) -> None:
    whole = request.SerializeToString()
    part = whole[: data.draw(st.integers(0, len(whole)))]
    try:
        assert field_beyond(part, REQUEST, MANY, MANY) is None
    except DecodeError:
        with pytest.raises(DecodeError):
            pb.GenerateRequest.FromString(part)


@pytest.mark.parametrize("data", [b"\x08", b"\x0a", b"\x0a\xff", b"\x08" + b"\xff" * 10 + b"\x01"])
def test_a_number_that_has_no_end_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError):
        field_beyond(data, REQUEST, MANY, MANY)
