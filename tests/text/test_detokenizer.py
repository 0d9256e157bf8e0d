"""Tokens to text as they come: the pieces add up to the whole, and no more is held back than must be."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpt_grpc.text.detokenizer import StopStrings, TextAssembler
from mpt_grpc.text.tokenizer import Tokenizer

NEOX = Path(__file__).parents[2].parent / "shared" / "data" / "neox"
WITHOUT_NEOX = f"MPT-7B's tokenizer is not at hand: no {NEOX}"
FAMILY = "👩‍👩‍👧‍👦"
TEXTS = ["Hello world", "日本語のテキスト、한국어", f"{FAMILY}🏳️‍🌈👍🏽 and 🦊", "naïve café\n\tx", "a\u0301\ufffd b", ""]


def tiny() -> Tokenizer:
    """A byte-level BPE with few merges, so that most characters beyond ASCII are split."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["the little fox said hello to the world 日本 🦊🦊"] * 3, trainer)
    backend.add_tokens(["    ", "🐙"])
    return Tokenizer(backend)


BOTH = [
    pytest.param(tiny, id="tiny"),
    pytest.param(
        lambda: Tokenizer.from_folder(NEOX),
        id="neox",
        marks=pytest.mark.skipif(not NEOX.is_dir(), reason=WITHOUT_NEOX),
    ),
]


@pytest.fixture(scope="module", params=BOTH)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


@pytest.fixture(scope="module")
def broken_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that are no whole characters."""
    return [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode((i,), skip_special_tokens=False)]


def output_ids(tokenizer: Tokenizer, broken_ids: list[int], max_size: int = 24) -> st.SearchStrategy[list[int]]:
    """Any ids, rich in broken characters, special tokens and real text."""
    piece = st.one_of(
        st.integers(0, tokenizer.vocab_size - 1).map(lambda token_id: [token_id]),
        st.sampled_from(broken_ids).map(lambda token_id: [token_id]),
        st.sampled_from(TEXTS).map(lambda text: list(tokenizer.encode(text))),
        st.just(list(tokenizer.encode("<|endoftext|>"))),
    )
    return st.lists(piece, max_size=max_size).map(lambda pieces: [token_id for ids in pieces for token_id in ids])


def deltas(
    tokenizer: Tokenizer, ids: Sequence[int], prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt_ids, skip_special_tokens)
    return [detokenizer.feed(token_id) for token_id in ids] + [detokenizer.flush()]


def whole_characters(data: bytes) -> str:
    """The text without a character that is unfinished at its end."""
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)


def bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


class TestDetokenizer:
    def test_the_deltas_of_any_tokens_are_the_whole_text(self, tokenizer: Tokenizer, broken_ids: list[int]) -> None:
        @settings(deadline=None, max_examples=300, derandomize=True)
        @given(output_ids(tokenizer, broken_ids), st.sampled_from(TEXTS), st.booleans())
        def check(ids: list[int], prompt: str, skip: bool) -> None:
            pieces = deltas(tokenizer, ids, tokenizer.encode(prompt), skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)

        check()

    def test_after_a_prompt_of_any_tokens_its_text_and_the_deltas_are_the_whole_text(
        self, tokenizer: Tokenizer, broken_ids: list[int]
    ) -> None:
        any_ids = output_ids(tokenizer, broken_ids, max_size=6)

        @settings(deadline=None, max_examples=300, derandomize=True)
        @given(any_ids, any_ids, st.booleans())
        def check(prompt_ids: list[int], ids: list[int], skip: bool) -> None:
            told = [i for i in prompt_ids if not skip or tokenizer.decode((i,)) != ""]
            prompt_text = whole_characters(bytes_of(tokenizer, told))
            pieces = deltas(tokenizer, ids, prompt_ids, skip)
            assert prompt_text + "".join(pieces) == tokenizer.decode(prompt_ids + ids, skip_special_tokens=skip)

        check()

    def test_a_character_comes_with_the_token_that_completes_it(
        self, tokenizer: Tokenizer, broken_ids: list[int]
    ) -> None:
        @settings(deadline=None, max_examples=100, derandomize=True)
        @given(output_ids(tokenizer, broken_ids))
        def check(ids: list[int]) -> None:
            detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
            text = ""
            for count, token_id in enumerate(ids, start=1):
                text += detokenizer.feed(token_id)
                assert text == whole_characters(bytes_of(tokenizer, ids[:count]))

        check()

    def test_a_prompt_that_ends_inside_an_emoji_does_not_leak_into_the_first_delta(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("Once upon a time 🧜 swam")
        for cut in range(1, len(ids)):
            prompt_text = whole_characters(bytes_of(tokenizer, ids[:cut]))
            text = "".join(deltas(tokenizer, ids[cut:], ids[:cut]))
            assert prompt_text + text == "Once upon a time 🧜 swam"
            assert "Once" not in text

    def test_an_emoji_that_the_prompt_began_and_the_output_breaks_is_one_replacement(
        self, tokenizer: Tokenizer
    ) -> None:
        prompt_ids = tokenizer.encode("Hi 🧜")[:-1]
        assert "".join(deltas(tokenizer, tokenizer.encode("no"), prompt_ids)) == "\ufffdno"

    def test_an_unfinished_character_at_the_end_is_not_lost(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("Hi 🧜")[:-1]
        *pieces, tail = deltas(tokenizer, ids)
        assert "".join(pieces) == "Hi "
        assert tail == "\ufffd"

    def test_special_tokens_have_no_text_unless_it_is_wanted(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("one<|endoftext|>two")
        assert "".join(deltas(tokenizer, ids)) == "onetwo"
        assert "".join(deltas(tokenizer, ids, skip_special_tokens=False)) == "one<|endoftext|>two"

    @pytest.mark.timeout(20)
    def test_endless_broken_bytes_take_time_in_proportion(self, tokenizer: Tokenizer, broken_ids: list[int]) -> None:
        ids = broken_ids[:1] * 50_000
        assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """A BPE with byte fallback, as SentencePiece has it: a run of bytes is decoded as one, or not at all."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁Hello", "▁world", "!", "▁"]
    backend = tokenizers.Tokenizer(
        models.BPE({token: token_id for token_id, token in enumerate(tokens)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


class TestDetokenizerOfOtherKinds:
    def test_whole_characters_come_as_the_tokenizer_decodes_them(self, fallback: Tokenizer) -> None:
        ids = [256, 257, *"🧜".encode(), 259, *"日本".encode(), 258]
        words = {256: b"Hello", 257: b" world", 258: b"!", 259: b" "}
        assert fallback.decode(ids) == "Hello world🧜 日本!"
        assert "".join(deltas(fallback, ids)) == "Hello world🧜 日本!"
        for cut in range(1, len(ids)):
            prompt_text = whole_characters(b"".join(words.get(i, bytes([i % 256])) for i in ids[:cut]))
            assert prompt_text + "".join(deltas(fallback, ids[cut:], ids[:cut])) == "Hello world🧜 日本!"

    def test_broken_bytes_fail_nothing_and_are_neither_held_for_ever_nor_lost(self, fallback: Tokenizer) -> None:
        detokenizer = fallback.detokenizer()
        assert "".join(detokenizer.feed(0xFF) for _ in range(1000)) == "\ufffd" * 1000
        assert detokenizer.feed(0xE6) + detokenizer.flush() == "\ufffd"

        @settings(deadline=None, max_examples=300, derandomize=True)
        @given(st.lists(st.sampled_from([0xC3, 0xA9, 0x80, 0xFF, 0x41, 256, 258]), max_size=12))
        def check(ids: list[int]) -> None:
            assert "".join(deltas(fallback, ids)).count("!") == ids.count(258)

        check()


def cut_up(text: str, cuts: list[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(borders)]


def by_the_rule(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The oracle: read on letter by letter until the text ends with a stop string; the longest one counts."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


ab_text = st.text(alphabet="ab日", max_size=20)
ab_stops = st.lists(st.text(alphabet="ab日", min_size=1, max_size=5), max_size=4)


class TestStopStrings:
    @settings(deadline=None, max_examples=1000, derandomize=True)
    @given(ab_text, ab_stops, st.lists(st.integers(0, 99), max_size=8), st.booleans())
    def test_the_first_completed_ends_the_text_however_it_is_cut(
        self, text: str, stops: list[str], cuts: list[int], include: bool
    ) -> None:
        finder = StopStrings(stops, include)
        told = "".join([finder.feed(piece) for piece in cut_up(text, cuts)]) + finder.flush()
        assert (told, finder.found) == by_the_rule(text, stops, include)

    @settings(deadline=None, max_examples=1000, derandomize=True)
    @given(ab_text, ab_stops)
    def test_only_what_may_become_a_stop_string_is_held_back(self, text: str, stops: list[str]) -> None:
        finder = StopStrings(stops)
        told = ""
        for count, letter in enumerate(text, start=1):
            told += finder.feed(letter)
            if finder.found is not None:
                return
            ends = [text[start:count] for start in range(count + 1)]
            held = next(end for end in ends if end == "" or any(stop.startswith(end) for stop in stops))
            assert told + held == text[:count]

    def test_text_goes_on_as_soon_as_it_is_no_stop_string(self) -> None:
        finder = StopStrings(["\n\nUser:"])
        pieces = ["a long line ", "of text\n", "\nUse", "less\n", "\nUser", ": hi"]
        assert [finder.feed(piece) for piece in pieces] == ["a long line ", "of text", "", "\n\nUseless", "", ""]
        assert finder.found == "\n\nUser:"

    def test_of_those_that_end_together_the_longest_is_met(self) -> None:
        finder = StopStrings(["b", "ab"])
        assert finder.feed("xaby") == "x"
        assert finder.found == "ab"

    def test_a_shorter_one_that_is_complete_earlier_is_met(self) -> None:
        finder = StopStrings(["abcd", "bc"])
        assert finder.feed("xabcd") == "xa"
        assert finder.found == "bc"

    def test_nothing_comes_after_a_stop_string(self) -> None:
        finder = StopStrings(["."], include_stop_string=True)
        assert finder.feed("One. Two") == "One."
        assert (finder.feed(" Three"), finder.flush()) == ("", "")


@given(st.lists(ab_text, max_size=8), ab_stops, st.integers(0, 8), st.booleans())
def test_a_stop_string_that_deaf_text_completes_is_passed_over(
    pieces: list[str], stops: list[str], num_deaf: int, include: bool
) -> None:
    finder = StopStrings(stops, include)
    told = "".join(finder.feed(piece, number < num_deaf) for number, piece in enumerate(pieces)) + finder.flush()
    text, deaf_end = "".join(pieces), len("".join(pieces[:num_deaf]))
    for end in range(deaf_end + 1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            assert (told, finder.found) == (text[:end] if include else text[: end - len(stop)], stop)
            return
    assert (told, finder.found) == (text, None)


def assembled(assembler: TextAssembler, ids: Sequence[int]) -> tuple[str, int]:
    """All the text that comes of the tokens, and how many of them were fed until a stop string was met."""
    text, num_fed = "", 0
    for token_id in ids:
        text += assembler.feed(token_id)
        num_fed += 1
        if assembler.stop_string is not None:
            break
    return text + assembler.finish(), num_fed


class TestTextAssembler:
    def test_the_text_is_the_whole_text_cut_at_the_first_stop_string(
        self, tokenizer: Tokenizer, broken_ids: list[int]
    ) -> None:
        stops = st.lists(st.sampled_from(["llo w", "日本", "👩‍👧", "\ufffd\ufffd", "fox", "o"]), max_size=3)

        @settings(deadline=None, max_examples=300, derandomize=True)
        @given(output_ids(tokenizer, broken_ids), stops, st.booleans())
        def check(ids: list[int], stops: list[str], include: bool) -> None:
            assembler = TextAssembler(tokenizer.detokenizer(), stops, include)
            text, _ = assembled(assembler, ids)
            assert (text, assembler.stop_string) == by_the_rule(tokenizer.decode(ids), stops, include)

        check()

    @pytest.mark.parametrize("stop", ["lo wor", FAMILY, "語の", "🦊"])
    def test_a_stop_string_over_token_borders_ends_the_text_before_it(self, tokenizer: Tokenizer, stop: str) -> None:
        text = f"Hello world {FAMILY} 日本語の 🦊 end"
        ids = tokenizer.encode(text)
        for include in (False, True):
            assembler = TextAssembler(tokenizer.detokenizer(), [stop], include)
            before = text[: text.index(stop)]
            assert assembled(assembler, ids)[0] == before + (stop if include else "")
            assert assembler.stop_string == stop

    def test_a_stop_string_is_met_at_the_token_that_completes_it(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("one, two, three, four")
        text, num_fed = assembled(TextAssembler(tokenizer.detokenizer(), ["two"]), ids)
        assert text == "one, "
        assert "two" in tokenizer.decode(ids[:num_fed])
        assert "two" not in tokenizer.decode(ids[: num_fed - 1])

    def test_an_emoji_that_might_begin_a_stop_string_comes_in_the_end(self, tokenizer: Tokenizer) -> None:
        assembler = TextAssembler(tokenizer.detokenizer(), [FAMILY])
        assert "".join(assembler.feed(i) for i in tokenizer.encode("Look: 👩‍👩")) == "Look: "
        assert assembler.num_held == len("👩‍👩")
        assert assembler.finish() == "👩‍👩"

    def test_without_stop_strings_every_token_is_used(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode(TEXTS[2])
        assert assembled(TextAssembler(tokenizer.detokenizer()), ids) == (TEXTS[2], len(ids))

    def test_a_stop_string_within_the_first_tokens_does_not_count_and_one_over_their_border_does(
        self, tokenizer: Tokenizer
    ) -> None:
        ids = tokenizer.encode("one, two, three, two, one")
        border = next(n for n in range(len(ids)) if "two" in tokenizer.decode(ids[:n]))
        for min_new_tokens, expected in ((border - 1, "one, "), (border, "one, two, three, ")):
            assembler = TextAssembler(tokenizer.detokenizer(), ["two"], min_new_tokens=min_new_tokens)
            assert assembled(assembler, ids)[0] == expected
        assembler = TextAssembler(tokenizer.detokenizer(), ["two, three"], min_new_tokens=border)
        assert assembled(assembler, ids)[0] == "one, "
