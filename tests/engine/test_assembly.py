"""Assembled outputs do not depend on how slowly they are read, and never contain what a guard blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_grpc.engine.assembly import GuardedOutput, OutputAssembly, PlainOutput, RequestAssembly
from mpt_grpc.engine.engine import Engine
from mpt_grpc.request import ChunkOptions, Finish, FinishReason, OutputDelta, TokenEvent, TokenLogprob
from mpt_grpc.text.detokenizer import TextAssembler
from mpt_grpc.text.guards import Guard, load_guards
from mpt_grpc.text.tokenizer import Tokenizer

END = Finish(FinishReason.MAX_NEW_TOKENS)
PIECES = (
    "the fox",
    " ran",
    " to the bad",
    " wolf",
    " bad",
    "ger",
    "bad",
    " wo",
    "lf.",
    " 日本",
    "🦊",
    "\n",
    " stop",
    " he",
    "re",
)


@pytest.fixture(scope="module")
def tokenizer(shared_engine: Engine) -> Tokenizer:
    return shared_engine.preparation.tokenizer


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Guard:
    words = tmp_path_factory.mktemp("guard") / "words.txt"
    words.write_text("bad wolf\n/日.*🦊/\n", encoding="utf-8")
    (guard,) = load_guards([f"words={Path(words)}"])
    return guard


class Reader:
    """Assembles one output from events and collects its deltas."""

    def __init__(
        self, tokenizer: Tokenizer, guard: Guard | None, stops: Sequence[str] = (), resumed: tuple[int, ...] = ()
    ) -> None:
        self.num_end_calls = 0
        text = TextAssembler(tokenizer.detokenizer(), stops)
        self.output: OutputAssembly = (
            PlainOutput(0, text, self._end, resumed)
            if guard is None
            else GuardedOutput(0, text, guard.watch(), self._end, resumed)
        )
        self.deltas: list[OutputDelta] = []

    def read(self, groups: Sequence[Sequence[int]]) -> None:
        """Feeds each group of tokens before it takes a delta; the last token also ends the output."""
        for number, group in enumerate(groups, start=1):
            events = [TokenEvent(0, token_id, TokenLogprob(token_id, -1.0, rank=1)) for token_id in group]
            if number == len(groups):
                events = [*events[:-1], events[-1]._replace(finish=END)] if events else [TokenEvent(0, finish=END)]
            for event in events:
                self.output.feed(event)
            if events and (delta := self.output.take()):
                self.deltas.append(delta)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for delta in self.deltas for token_id in delta.token_ids)

    def _end(self, _: Finish) -> None:
        self.num_end_calls += 1


def grouped(ids: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in itertools.pairwise(bounds)]


texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)
cuts = st.lists(st.integers(0, 99), max_size=8)
stops = st.sampled_from([(), ("stop here",), ("lf", "🦊")])


def test_output_does_not_depend_on_how_slowly_it_is_read(tokenizer: Tokenizer, guard: Guard) -> None:
    @settings(deadline=None, max_examples=300, derandomize=True)
    @given(texts, cuts, stops, st.booleans())
    def check(text: str, cuts: list[int], stops: tuple[str, ...], is_guarded: bool) -> None:
        ids = tokenizer.encode(text)
        readers = [Reader(tokenizer, guard if is_guarded else None, stops) for _ in range(2)]
        readers[0].read([[token_id] for token_id in ids])
        readers[1].read(grouped(ids, cuts))
        assert readers[0].text == readers[1].text
        assert readers[0].token_ids == readers[1].token_ids
        assert readers[0].deltas[-1].finish == readers[1].deltas[-1].finish

    check()


def test_blocked_content_is_sent_neither_as_text_nor_as_tokens(tokenizer: Tokenizer, guard: Guard) -> None:
    num_blocked = 0

    @settings(deadline=None, max_examples=300, derandomize=True)
    @given(texts, cuts)
    def check(text: str, cuts: list[int]) -> None:
        nonlocal num_blocked
        ids = tokenizer.encode(text)
        unguarded, guarded = Reader(tokenizer, None), Reader(tokenizer, guard)
        unguarded.read(grouped(ids, cuts))
        guarded.read(grouped(ids, cuts))
        finish = guarded.deltas[-1].finish
        assert finish is not None
        if finish.reason is FinishReason.CONTENT_FILTER:
            num_blocked += 1
            assert guarded.num_end_calls == 1
            assert guard.refusal(guarded.text) is None
            assert guard.refusal(tokenizer.decode(guarded.token_ids)) is None
            assert unguarded.text.startswith(guarded.text)
            assert guarded.text.startswith(tokenizer.decode(guarded.token_ids).rstrip("\ufffd"))
        else:
            assert guard.refusal(unguarded.text) is None
            assert (guarded.text, guarded.token_ids, finish) == (unguarded.text, unguarded.token_ids, END)
        for delta in guarded.deltas:
            assert [logprob.token_id for logprob in delta.logprobs] == list(delta.token_ids)

    check()
    assert num_blocked > 10


def test_resumed_output_continues_exactly_where_it_was_interrupted(tokenizer: Tokenizer, guard: Guard) -> None:
    @settings(deadline=None, max_examples=300, derandomize=True)
    @given(texts, cuts, stops, st.booleans(), st.integers(0, 20))
    def check(text: str, cuts: list[int], stops: tuple[str, ...], is_guarded: bool, num_read: int) -> None:
        ids = tokenizer.encode(text)
        whole = Reader(tokenizer, guard if is_guarded else None, stops)
        whole.read(grouped(ids, cuts))
        received = whole.deltas[: min(num_read, len(whole.deltas) - 1)]
        received_ids = tuple(token_id for delta in received for token_id in delta.token_ids)
        rest = Reader(tokenizer, guard if is_guarded else None, stops, received_ids)
        rest.read([[token_id] for token_id in ids[len(received_ids) :]] or [[]])
        assert "".join(delta.text for delta in received) + rest.text == whole.text
        assert received_ids + rest.token_ids == whole.token_ids
        assert rest.deltas[-1].finish == whole.deltas[-1].finish

    check()


CHUNKS = st.builds(
    ChunkOptions, st.one_of(st.none(), st.integers(1, 8)), st.one_of(st.none(), st.sampled_from([1e-9, 1e9]))
)


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1), options=CHUNKS, fails=st.booleans(), data=st.data())
def test_everything_is_sent_once_and_in_order_whatever_the_size_of_chunks(
    tokenizer: Tokenizer, pieces: list[str], options: ChunkOptions, fails: bool, data: st.DataObject
) -> None:
    tokens = list(tokenizer.encode("".join(pieces)))
    events = [TokenEvent(0, token, TokenLogprob(token, -1.0, rank=1)) for token in tokens]
    events.append(TokenEvent(0, error=RuntimeError()) if fails else TokenEvent(0, finish=END))
    output = PlainOutput(0, TextAssembler(tokenizer.detokenizer(), ()), lambda _: None)
    assembly = RequestAssembly([output], options, is_guarded=False)
    deltas: list[OutputDelta] = []
    while events:
        size = data.draw(st.integers(1, 4))
        group, events = events[:size], events[size:]
        deltas += assembly.advance(group)
        assert deltas, "the first token is sent at once"
    assert [token for delta in deltas for token in delta.token_ids] == tokens
    assert [logprob.token_id for delta in deltas for logprob in delta.logprobs] == tokens
    if not fails:
        assert "".join(delta.text for delta in deltas) == tokenizer.decode(tokens)
        assert deltas[-1].finish == END
    if options.num_tokens is not None and options.interval_s != 1e-9:
        assert all(len(delta.token_ids) >= options.num_tokens for delta in deltas[1:-1])
