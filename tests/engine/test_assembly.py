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
from mpt_grpc.errors import InternalError
from mpt_grpc.request import ChunkOptions
from mpt_grpc.results import Finish, FinishReason, OutputDelta, RequestStats, TokenEvent, TokenLogprob
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
        self.output.resume()
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
    @settings(max_examples=300, derandomize=True)
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

    @settings(max_examples=300, derandomize=True)
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
    @settings(max_examples=300, derandomize=True)
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


@settings(max_examples=100)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1), options=CHUNKS, fails=st.booleans(), data=st.data())
def test_everything_is_sent_once_and_in_order_whatever_the_size_of_chunks(
    tokenizer: Tokenizer, pieces: list[str], options: ChunkOptions, fails: bool, data: st.DataObject
) -> None:
    tokens = list(tokenizer.encode("".join(pieces)))
    events = [TokenEvent(0, token, TokenLogprob(token, -1.0, rank=1)) for token in tokens]
    events.append(TokenEvent(0, error=RuntimeError()) if fails else TokenEvent(0, finish=END))
    output = PlainOutput(0, TextAssembler(tokenizer.detokenizer(), ()), lambda _: None)
    assembly = RequestAssembly({0: output}, options, is_guarded=False, begins_slowly=False)
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


STATS = RequestStats(
    num_prompt_tokens=3,
    num_cached_tokens=0,
    num_preemptions=0,
    seed=1,
    arrival_time_s=0,
    scheduled_time_s=1,
    first_token_time_s=2,
    end_time_s=3,
    num_output_tokens=99,
)
PROMPT_LOGPROBS = (TokenLogprob(1, -1.0, 1),)


def test_a_request_gives_one_delta_for_each_output_and_its_statistics_with_the_last(tokenizer: Tokenizer) -> None:
    outputs = [PlainOutput(index, TextAssembler(tokenizer.detokenizer()), lambda _: None) for index in range(3)]
    assembly = RequestAssembly(dict(enumerate(outputs)), ChunkOptions(), is_guarded=False, begins_slowly=False)
    one, two, *_ = tokenizer.encode("one two three")
    assert [delta.token_ids for delta in assembly.advance([TokenEvent(1, one), TokenEvent(0, two)])] == [(one,), (two,)]
    deltas = assembly.advance([TokenEvent(2, one), TokenEvent(1, one, finish=END), TokenEvent(2, two, finish=END)])
    assert [(delta.index, delta.token_ids, delta.stats) for delta in deltas] == [
        (2, (one, two), None),
        (1, (one,), None),
    ]
    assert not assembly.ended
    eos = Finish(FinishReason.EOS_TOKEN, stop_token_id=two)
    (last,) = assembly.advance([TokenEvent(0, two, finish=eos, stats=STATS)])
    assert last.stats is not None
    assert (last.stats.num_output_tokens, last.stats.finishes) == (6, (eos, END, END))
    assert (assembly.ended, assembly.error) == (True, None)


def test_resumed_tokens_are_read_once_before_the_first_event(tokenizer: Tokenizer) -> None:
    ends: list[Finish] = []
    text = TextAssembler(tokenizer.detokenizer(), ["bad wolf"])
    output = PlainOutput(0, text, ends.append, tuple(tokenizer.encode("the bad")))
    assembly = RequestAssembly({0: output}, ChunkOptions(), is_guarded=False, begins_slowly=True)
    assert assembly.is_slow
    for character in " wolf":
        assembly.advance([TokenEvent(0, token_id) for token_id in tokenizer.encode(character)])
        assert not assembly.is_slow
    assert [end.stop_string for end in ends] == ["bad wolf"]


def test_outputs_that_end_together_have_the_statistics_in_the_last_delta(tokenizer: Tokenizer) -> None:
    outputs = [PlainOutput(index, TextAssembler(tokenizer.detokenizer()), lambda _: None) for index in range(2)]
    assembly = RequestAssembly(dict(enumerate(outputs)), ChunkOptions(), is_guarded=False, begins_slowly=False)
    deltas = assembly.advance([TokenEvent(0, 7, finish=END), TokenEvent(1, 8, finish=END, stats=STATS)])
    assert [(delta.index, delta.token_ids, delta.stats is None) for delta in deltas] == [
        (0, (7,), True),
        (1, (8,), False),
    ]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (ChunkOptions(), [1] * 8 + [0]),
        (ChunkOptions(num_tokens=3), [1, 3, 3, 1]),
        (ChunkOptions(interval_s=1e9), [1, 7]),
        (ChunkOptions(num_tokens=3, interval_s=1e9), [1, 3, 3, 1]),
    ],
)
def test_tokens_are_sent_in_chunks_of_the_wanted_number_or_time(
    tokenizer: Tokenizer, options: ChunkOptions, sizes: list[int]
) -> None:
    output = PlainOutput(0, TextAssembler(tokenizer.detokenizer(), ()), lambda _: None)
    assembly = RequestAssembly({0: output}, options, is_guarded=False, begins_slowly=False)
    events = [*(TokenEvent(0, token_id) for token_id in range(20, 28)), TokenEvent(0, finish=END)]
    deltas = [delta for event in events for delta in assembly.advance([event])]
    assert [len(delta.token_ids) for delta in deltas] == sizes


def test_a_failed_request_gives_what_came_before_its_error(tokenizer: Tokenizer) -> None:
    output = PlainOutput(0, TextAssembler(tokenizer.detokenizer()), lambda _: None)
    assembly = RequestAssembly({0: output}, ChunkOptions(), is_guarded=False, begins_slowly=False)
    error = InternalError("fault")
    assert not assembly.ended
    (delta,) = assembly.advance([TokenEvent(0, 7), TokenEvent(0, error=error)])
    assert delta.token_ids == (7,)
    assert (assembly.ended, assembly.error) == (True, error)


@pytest.mark.parametrize("is_guarded", [False, True])
class TestEveryOutput:
    def test_nothing_is_sent_before_anything_happens(
        self, tokenizer: Tokenizer, guard: Guard, is_guarded: bool
    ) -> None:
        assert Reader(tokenizer, guard if is_guarded else None).output.take() is None

    @pytest.mark.parametrize("reason", [FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN, FinishReason.MAX_NEW_TOKENS])
    @pytest.mark.parametrize("names_token", [False, True])
    def test_a_token_that_ended_the_output_has_no_text(
        self, tokenizer: Tokenizer, guard: Guard, is_guarded: bool, reason: FinishReason, names_token: bool
    ) -> None:
        output = Reader(tokenizer, guard if is_guarded else None).output
        *first, last = tokenizer.encode("the fox ran")
        finish = Finish(reason, stop_token_id=last if names_token else None)
        for token_id in first:
            output.feed(TokenEvent(0, token_id))
        output.feed(TokenEvent(0, last, finish=finish))
        is_textless = names_token and reason is not FinishReason.MAX_NEW_TOKENS
        text = tokenizer.decode(tuple(first) if is_textless else (*first, last))
        assert output.take() == OutputDelta(0, text, (*first, last), finish=finish)

    @pytest.mark.parametrize("token_id", [None, 7])
    def test_the_log_probabilities_of_the_prompt_are_sent_once_and_at_once(
        self, tokenizer: Tokenizer, guard: Guard, is_guarded: bool, token_id: int | None
    ) -> None:
        output = Reader(tokenizer, guard if is_guarded else None).output
        output.feed(TokenEvent(0, token_id, prompt_logprobs=PROMPT_LOGPROBS))
        first = output.take()
        assert first is not None
        assert first.prompt_logprobs == PROMPT_LOGPROBS
        output.feed(TokenEvent(0, 7, finish=END))
        last = output.take()
        assert last is not None
        assert (last.prompt_logprobs, last.finish) == ((), END)

    def test_a_stop_string_ends_the_output_once_with_no_token_after_it(
        self, tokenizer: Tokenizer, guard: Guard, is_guarded: bool
    ) -> None:
        reader = Reader(tokenizer, guard if is_guarded else None, ["fox"])
        whole, after = tokenizer.encode("the fox"), tokenizer.encode(" ran fox")
        reader.read([[token_id] for token_id in (*whole, *after)])
        assert reader.text == "the "
        assert reader.token_ids == tuple(whole)
        assert reader.num_end_calls == 1
        assert reader.deltas[-1].finish == Finish(FinishReason.STOP_STRING, stop_string="fox")

    def test_a_stop_string_completed_by_the_last_token_is_the_reason_of_the_end(
        self, tokenizer: Tokenizer, guard: Guard, is_guarded: bool
    ) -> None:
        reader = Reader(tokenizer, guard if is_guarded else None, ["fox"])
        reader.read([tokenizer.encode("the fox")])
        assert reader.text == "the "
        assert reader.deltas[-1].finish == Finish(FinishReason.STOP_STRING, stop_string="fox")

    def test_a_token_is_sent_as_soon_as_nothing_can_be_held_back(
        self, tokenizer: Tokenizer, guard: Guard, is_guarded: bool
    ) -> None:
        reader, ids = Reader(tokenizer, guard if is_guarded else None), tokenizer.encode("the fox ran.\n")
        reader.read([[token_id] for token_id in ids])
        assert [delta.token_ids for delta in reader.deltas] == [(token_id,) for token_id in ids]
        assert [delta.text for delta in reader.deltas] == [tokenizer.decode((token_id,)) for token_id in ids]


def test_tokens_are_sent_at_once_even_if_their_text_is_held_back(tokenizer: Tokenizer) -> None:
    reader, ids = Reader(tokenizer, None, ["the fox ran off"]), tokenizer.encode("the fox ran")
    reader.read([*([token_id] for token_id in ids), []])
    assert [delta.token_ids for delta in reader.deltas] == [*((token_id,) for token_id in ids), ()]
    assert [delta.text for delta in reader.deltas] == [*("" for _ in ids), "the fox ran"]


def test_under_a_guard_the_tokens_of_a_character_wait_for_it_even_after_text_that_was_held_back(
    tokenizer: Tokenizer, guard: Guard
) -> None:
    reader = Reader(tokenizer, guard, ["x本"])
    (first,), character = tokenizer.encode("x"), tokenizer.encode("日")
    assert len(character) > 1
    reader.read([[token_id] for token_id in (first, *character)] + [[]])
    assert [(delta.text, delta.token_ids) for delta in reader.deltas] == [("x", (first,)), ("日", character)]


def test_under_a_guard_tokens_are_sent_with_their_text(tokenizer: Tokenizer, guard: Guard) -> None:
    reader, ids = Reader(tokenizer, guard, ["bad fox ran off"]), tokenizer.encode("bad fox ran")
    reader.read([*([token_id] for token_id in ids), []])
    assert [(delta.token_ids, delta.text) for delta in reader.deltas] == [(tuple(ids), "bad fox ran")]


def test_under_a_guard_resumed_text_is_not_sent_again_even_if_a_stop_string_may_start_with_it(
    tokenizer: Tokenizer, guard: Guard
) -> None:
    ids = tokenizer.encode("bad fox ran")
    reader = Reader(tokenizer, guard, ["bad fox ran off"], resumed=ids[:-1])
    reader.read([ids[-1:], []])
    assert (reader.token_ids, reader.text) == (ids[-1:], tokenizer.decode(ids[-1:]))
