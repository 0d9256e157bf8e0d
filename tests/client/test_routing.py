"""Which server a generation goes to, by the beginning of its prompt and by what is in progress."""

from __future__ import annotations

import gc

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc_client import Client, Message, MptGrpcError, Role
from mpt_grpc_client.failover import Attempts
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.request import build_request
from mpt_grpc_client.rotation import Rotation, Server
from mpt_grpc_client.routing import BEGINNING_BYTES, beginning, order

SYSTEM = Message(Role.SYSTEM, "You are the keeper of a lighthouse. " * 20)
LONG = "There was a fox who lived by the sea. " * 20
TARGETS = [f"10.0.0.{number}:50051" for number in range(8)]
beginnings = st.binary(min_size=1, max_size=40)
fleets = st.lists(st.sampled_from(TARGETS), min_size=1, unique=True)


@given(beginnings, fleets, st.data())
def test_servers_that_are_equally_busy_are_in_one_order_for_all_clients(
    prompt: bytes, targets: list[str], data: st.DataObject
) -> None:
    load, turn = data.draw(st.integers(0, 50)), data.draw(st.integers(0, len(targets) - 1))
    preferred = [targets[index] for index in order(prompt, targets, [load] * len(targets), turn)]
    listed = data.draw(st.permutations(targets))
    assert sorted(preferred) == sorted(targets)
    assert [listed[index] for index in order(prompt, listed, [0] * len(targets), 0)] == preferred


@given(beginnings, fleets, st.data())
def test_a_server_that_goes_moves_only_its_own_prompts(prompt: bytes, targets: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(targets))
    rest = [target for target in targets if target != gone]
    before = [targets[index] for index in order(prompt, targets, [0] * len(targets), 0)]
    after = [rest[index] for index in order(prompt, rest, [0] * len(rest), 0)] if rest else []
    assert after == [target for target in before if target != gone]


@given(st.lists(beginnings, min_size=1, max_size=3), st.integers(1, 8), st.integers(1, 100))
def test_no_server_has_much_more_than_its_share(prompts: list[bytes], num_servers: int, num_calls: int) -> None:
    loads = [0] * num_servers
    for call in range(num_calls):
        loads[order(prompts[call % len(prompts)], TARGETS[:num_servers], loads, 0)[0]] += 1
    assert max(loads) <= max(4, 1.1 * num_calls / num_servers) + 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_a_short_prompt_goes_to_the_least_busy_server_and_equal_ones_take_turns(
    loads: list[int], data: st.DataObject
) -> None:
    turn = data.draw(st.integers(0, len(loads) - 1))
    preferred = order(b"", TARGETS[: len(loads)], loads, turn)
    assert [loads[index] for index in preferred] == sorted(loads)
    assert len(set(loads)) > 1 or preferred[0] == turn


def test_prompts_are_spread_evenly() -> None:
    counts = dict.fromkeys(TARGETS, 0)
    for number in range(4000):
        counts[TARGETS[order(b"%d" % number, TARGETS, [0] * len(TARGETS), 0)[0]]] += 1
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_all_turns_of_a_conversation_begin_alike_and_other_conversations_do_not() -> None:
    first = [SYSTEM, Message(Role.USER, "Who are you?")]
    later = [*first, Message(Role.ASSISTANT, "The keeper."), Message(Role.USER, "Of what?")]
    other = [SYSTEM, Message(Role.USER, "Where are you?")]
    one, same, different = (beginning(build_request(messages)) for messages in (first, later, other))
    assert one == same != different
    assert beginning(build_request(first, cache_salt="tenant")) != one


@pytest.mark.parametrize("prompt", [LONG, list(range(300))])
def test_prompts_with_the_same_long_beginning_begin_alike(prompt: str | list[int]) -> None:
    assert beginning(build_request(prompt)) == beginning(build_request(prompt + prompt[:9])) != b""
    assert beginning(build_request(prompt[1:])) != beginning(build_request(prompt))


def test_prompts_that_are_short_or_not_cached_have_no_beginning() -> None:
    for prompt in ("", "é" * (BEGINNING_BYTES // 2 - 1), [5] * 127, [Message(Role.USER, "Hi")]):
        assert beginning(build_request(prompt)) == b""
    assert beginning(build_request(LONG, cache_bypass=True)) == b""


def test_a_generation_counts_as_load_of_the_server_that_runs_it() -> None:
    rotation = Rotation([Server(target, None) for target in "ab"], is_balanced=True)
    request = pb.GenerateRequest(text="short")
    loads = lambda: [len(server.generations) for server in rotation.servers]  # noqa: E731
    one, _ = (Attempts(rotation, None, retries=False, generation=request) for _ in range(2))
    assert loads() == [1, 1]
    failure = MptGrpcError("gone", code=grpc.StatusCode.UNAVAILABLE)
    assert one.after(failure) == 0
    assert loads() == [0, 2]
    Attempts(rotation, None, retries=False)
    for _ in range(2):
        one.end()
    assert loads() == [0, 1]


@pytest.mark.usefixtures("scripted")
def test_every_end_of_a_stream_takes_its_load_away(client: Client) -> None:
    (server,) = client._rotation.servers
    stream = client.stream("Once")
    assert len(server.generations) == 1
    list(stream)
    assert not server.generations
    client.stream("Once").cancel()
    assert not server.generations
    dropped = client.stream("Once")
    assert len(server.generations) == 1
    del dropped
    gc.collect()
    assert not server.generations
