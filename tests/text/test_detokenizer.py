"""Incremental detokenization: the deltas add up to the complete text, and no more is held back than necessary."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from processor_time import processor_seconds
from tokenizers import decoders, models, pre_tokenizers, trainers

from mpt_grpc.text.detokenizer import StopStrings, TextAssembler
from mpt_grpc.text.tokenizer import Tokenizer

NEOX = Path(__file__).parents[2].parent / "shared" / "data" / "neox"
WITHOUT_NEOX = f"MPT-7B's tokenizer is not available: {NEOX} does not exist"
FAMILY = "👩‍👩‍👧‍👦"
TEXTS = ["Hello world", "日本語のテキスト、한국어", f"{FAMILY}🏳️‍🌈👍🏽 and 🦊", "naïve café\n\tx", "a\u0301\ufffd b", ""]


def tiny() -> Tokenizer:
    """A byte-level BPE with few merges, in which most non-ASCII characters take several tokens."""
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
    tokenizer: Tokenizer = request.param()
    return tokenizer


@pytest.fixture(scope="module")
def broken_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that do not consist of complete characters."""
    return [i for i in range(tokenizer.vocab_size) if "\ufffd" in tokenizer.decode((i,), skip_special_tokens=False)]


def output_ids(tokenizer: Tokenizer, broken_ids: list[int], max_size: int = 24) -> st.SearchStrategy[list[int]]:
    """Random ids with many incomplete characters, special tokens and pieces of real text."""
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
    """Decodes bytes, leaving out an incomplete character at the end."""
    return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)


def bytes_of(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    return b"".join(map(tokenizer.token_bytes, ids))


class TestDetokenizer:
    def test_deltas_of_any_tokens_add_up_to_the_decoded_text(self, tokenizer: Tokenizer, broken_ids: list[int]) -> None:
        @settings(max_examples=300, derandomize=True)
        @given(output_ids(tokenizer, broken_ids), st.sampled_from(TEXTS), st.booleans())
        def check(ids: list[int], prompt: str, skip: bool) -> None:
            pieces = deltas(tokenizer, ids, tokenizer.encode(prompt), skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)

        check()

    def test_text_of_any_prompt_and_the_deltas_add_up_to_the_decoded_text(
        self, tokenizer: Tokenizer, broken_ids: list[int]
    ) -> None:
        any_ids = output_ids(tokenizer, broken_ids, max_size=6)

        @settings(max_examples=300, derandomize=True)
        @given(any_ids, any_ids, st.booleans())
        def check(prompt_ids: list[int], ids: list[int], skip: bool) -> None:
            not_skipped = [i for i in prompt_ids if not skip or tokenizer.decode((i,)) != ""]
            prompt_text = whole_characters(bytes_of(tokenizer, not_skipped))
            pieces = deltas(tokenizer, ids, prompt_ids, skip)
            assert prompt_text + "".join(pieces) == tokenizer.decode(prompt_ids + ids, skip_special_tokens=skip)

        check()

    def test_character_is_returned_with_the_token_that_completes_it(
        self, tokenizer: Tokenizer, broken_ids: list[int]
    ) -> None:
        @settings(max_examples=100, derandomize=True)
        @given(output_ids(tokenizer, broken_ids))
        def check(ids: list[int]) -> None:
            detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
            text = ""
            for count, token_id in enumerate(ids, start=1):
                text += detokenizer.feed(token_id)
                assert text == whole_characters(bytes_of(tokenizer, ids[:count]))

        check()

    def test_prompt_that_ends_inside_an_emoji_does_not_leak_into_the_first_delta(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("Once upon a time 🧜 swam")
        for cut in range(1, len(ids)):
            prompt_text = whole_characters(bytes_of(tokenizer, ids[:cut]))
            text = "".join(deltas(tokenizer, ids[cut:], ids[:cut]))
            assert prompt_text + text == "Once upon a time 🧜 swam"
            assert "Once" not in text

    def test_emoji_begun_by_the_prompt_and_broken_by_the_output_becomes_one_replacement_character(
        self, tokenizer: Tokenizer
    ) -> None:
        prompt_ids = tokenizer.encode("Hi 🧜")[:-1]
        assert "".join(deltas(tokenizer, tokenizer.encode("no"), prompt_ids)) == "\ufffdno"

    def test_incomplete_character_at_the_end_is_not_lost(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("Hi 🧜")[:-1]
        *pieces, tail = deltas(tokenizer, ids)
        assert "".join(pieces) == "Hi "
        assert tail == "\ufffd"

    def test_special_tokens_have_text_only_if_not_skipped(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("one<|endoftext|>two")
        assert "".join(deltas(tokenizer, ids)) == "onetwo"
        assert "".join(deltas(tokenizer, ids, skip_special_tokens=False)) == "one<|endoftext|>two"

    @pytest.mark.timeout(20)
    def test_many_broken_bytes_take_linear_time(self, tokenizer: Tokenizer, broken_ids: list[int]) -> None:
        ids = broken_ids[:1] * 50_000
        assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """A BPE with byte fallback like SentencePiece's, where a run of byte tokens is decoded together or not at all."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁Hello", "▁world", "!", "▁"]
    backend = tokenizers.Tokenizer(
        models.BPE({token: token_id for token_id, token in enumerate(tokens)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


class TestStreamDetokenizer:
    def test_complete_characters_are_decoded_as_by_the_tokenizer(self, fallback: Tokenizer) -> None:
        ids = [256, 257, *"🧜".encode(), 259, *"日本".encode(), 258]
        words = {256: b"Hello", 257: b" world", 258: b"!", 259: b" "}
        assert fallback.decode(ids) == "Hello world🧜 日本!"
        assert "".join(deltas(fallback, ids)) == "Hello world🧜 日本!"
        for cut in range(1, len(ids)):
            prompt_text = whole_characters(b"".join(words.get(i, bytes([i % 256])) for i in ids[:cut]))
            assert prompt_text + "".join(deltas(fallback, ids[cut:], ids[:cut])) == "Hello world🧜 日本!"

    def test_broken_bytes_neither_fail_nor_stall_nor_get_lost(self, fallback: Tokenizer) -> None:
        detokenizer = fallback.detokenizer()
        assert "".join(detokenizer.feed(0xFF) for _ in range(1000)) == "\ufffd" * 1000
        assert detokenizer.feed(0xE6) + detokenizer.flush() == "\ufffd"

        @settings(max_examples=300, derandomize=True)
        @given(st.lists(st.sampled_from([0xC3, 0xA9, 0x80, 0xFF, 0x41, 256, 258]), max_size=12))
        def check(ids: list[int]) -> None:
            assert "".join(deltas(fallback, ids)).count("!") == ids.count(258)

        check()


def split(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def reference(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The oracle: reads character by character until the text ends with a stop string, and takes the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


ab_text = st.text(alphabet="ab日", max_size=20)
ab_stops = st.lists(st.text(alphabet="ab日", min_size=1, max_size=5), max_size=4)


class TestStopStrings:
    @settings(max_examples=1000, derandomize=True)
    @given(ab_text, ab_stops, st.lists(st.integers(0, 99), max_size=8), st.booleans())
    def test_first_completed_stop_string_ends_the_text_however_it_is_split(
        self, text: str, stops: list[str], cuts: list[int], include: bool
    ) -> None:
        finder = StopStrings(stops, include)
        sent = "".join([finder.feed(piece) for piece in split(text, cuts)]) + finder.flush()
        assert (sent, finder.found) == reference(text, stops, include)

    @settings(max_examples=1000, derandomize=True)
    @given(ab_text, ab_stops)
    def test_only_a_possible_start_of_a_stop_string_is_held_back(self, text: str, stops: list[str]) -> None:
        finder = StopStrings(stops)
        sent = ""
        for count, letter in enumerate(text, start=1):
            sent += finder.feed(letter)
            if finder.found is not None:
                return
            suffixes = [text[start:count] for start in range(count + 1)]
            held = next(end for end in suffixes if end == "" or any(stop.startswith(end) for stop in stops))
            assert sent + held == text[:count]

    def test_held_text_is_returned_once_it_cannot_become_a_stop_string(self) -> None:
        finder = StopStrings(["\n\nUser:"])
        pieces = ["a long line ", "of text\n", "\nUse", "less\n", "\nUser", ": hi"]
        assert [finder.feed(piece) for piece in pieces] == ["a long line ", "of text", "", "\n\nUseless", "", ""]
        assert finder.found == "\n\nUser:"

    def test_longest_of_several_stop_strings_with_the_same_end_is_found(self) -> None:
        finder = StopStrings(["b", "ab"])
        assert finder.feed("xaby") == "x"
        assert finder.found == "ab"

    def test_stop_string_completed_first_is_found_even_if_shorter(self) -> None:
        finder = StopStrings(["abcd", "bc"])
        assert finder.feed("xabcd") == "xa"
        assert finder.found == "bc"

    def test_many_stop_strings_take_as_long_as_one_to_be_found(self) -> None:
        def seconds(num_stops: int) -> float:
            finder = StopStrings([f"the {letter}" for letter in "abcdefghijklmnop"[:num_stops]])
            return min(processor_seconds(lambda: [finder.feed("the ") for _ in range(500)]) for _ in range(3))

        assert seconds(16) < 4 * seconds(1)

    def test_no_text_is_returned_after_a_stop_string(self) -> None:
        finder = StopStrings(["."], include_stop_string=True)
        assert finder.feed("One. Two") == "One."
        assert (finder.feed(" Three"), finder.flush()) == ("", "")


@given(st.lists(ab_text, max_size=8), ab_stops, st.integers(0, 8), st.booleans())
def test_stop_strings_are_ignored_in_the_first_pieces_on_request(
    pieces: list[str], stops: list[str], num_ignoring: int, include: bool
) -> None:
    finder = StopStrings(stops, include)
    sent = "".join(finder.feed(piece, number < num_ignoring) for number, piece in enumerate(pieces)) + finder.flush()
    text, ignoring_end = "".join(pieces), len("".join(pieces[:num_ignoring]))
    for end in range(ignoring_end + 1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            assert (sent, finder.found) == (text[:end] if include else text[: end - len(stop)], stop)
            return
    assert (sent, finder.found) == (text, None)


def assembled(assembler: TextAssembler, ids: Sequence[int]) -> tuple[str, int]:
    """Returns the text of the tokens, and how many of them were fed before a stop string was found."""
    text, num_fed = "", 0
    for token_id in ids:
        text += assembler.feed(token_id)
        num_fed += 1
        if assembler.stop_string is not None:
            break
    return text + assembler.finish(), num_fed


class TestTextAssembler:
    def test_text_ends_at_the_first_stop_string(self, tokenizer: Tokenizer, broken_ids: list[int]) -> None:
        stops = st.lists(st.sampled_from(["llo w", "日本", "👩‍👧", "\ufffd\ufffd", "fox", "o"]), max_size=3)

        @settings(max_examples=300, derandomize=True)
        @given(output_ids(tokenizer, broken_ids), stops, st.booleans())
        def check(ids: list[int], stops: list[str], include: bool) -> None:
            assembler = TextAssembler(tokenizer.detokenizer(), stops, include)
            text, _ = assembled(assembler, ids)
            assert (text, assembler.stop_string) == reference(tokenizer.decode(ids), stops, include)

        check()

    @pytest.mark.parametrize("stop", ["lo wor", FAMILY, "語の", "🦊"])
    def test_stop_string_across_token_boundaries_ends_the_text_before_it(self, tokenizer: Tokenizer, stop: str) -> None:
        text = f"Hello world {FAMILY} 日本語の 🦊 end"
        ids = tokenizer.encode(text)
        for include in (False, True):
            assembler = TextAssembler(tokenizer.detokenizer(), [stop], include)
            before = text[: text.index(stop)]
            assert assembled(assembler, ids)[0] == before + (stop if include else "")
            assert assembler.stop_string == stop

    def test_stop_string_is_found_at_the_token_that_completes_it(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("one, two, three, four")
        text, num_fed = assembled(TextAssembler(tokenizer.detokenizer(), ["two"]), ids)
        assert text == "one, "
        assert "two" in tokenizer.decode(ids[:num_fed])
        assert "two" not in tokenizer.decode(ids[: num_fed - 1])

    def test_emoji_held_back_for_a_stop_string_is_returned_at_the_end(self, tokenizer: Tokenizer) -> None:
        assembler = TextAssembler(tokenizer.detokenizer(), [FAMILY])
        assert "".join(assembler.feed(i) for i in tokenizer.encode("Look: 👩‍👩")) == "Look: "
        assert assembler.num_held == len("👩‍👩")
        assert assembler.finish() == "👩‍👩"

    def test_without_stop_strings_all_text_is_returned(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode(TEXTS[2])
        assert assembled(TextAssembler(tokenizer.detokenizer()), ids) == (TEXTS[2], len(ids))

    def test_stop_string_within_min_new_tokens_is_ignored_but_one_that_extends_beyond_is_not(
        self, tokenizer: Tokenizer
    ) -> None:
        ids = tokenizer.encode("one, two, three, two, one")
        num_first = next(n for n in range(len(ids)) if "two" in tokenizer.decode(ids[:n]))
        for min_new_tokens, expected in ((num_first - 1, "one, "), (num_first, "one, two, three, ")):
            assembler = TextAssembler(tokenizer.detokenizer(), ["two"], min_new_tokens=min_new_tokens)
            assert assembled(assembler, ids)[0] == expected
        assembler = TextAssembler(tokenizer.detokenizer(), ["two, three"], min_new_tokens=num_first)
        assert assembled(assembler, ids)[0] == "one, "

    @pytest.mark.parametrize("min_new_tokens", range(5))
    def test_stop_strings_end_the_text_from_the_first_token_after_min_new_tokens(
        self, tokenizer: Tokenizer, min_new_tokens: int
    ) -> None:
        (stop,) = tokenizer.encode("o")
        assembler = TextAssembler(tokenizer.detokenizer(), ["o"], min_new_tokens=min_new_tokens)
        assert assembled(assembler, [stop] * 9) == ("o" * min_new_tokens, min_new_tokens + 1)

    @pytest.mark.parametrize(("min_new_tokens", "is_found"), [(0, True), (2, False), (3, False)])
    def test_a_stop_string_completed_at_the_end_is_ignored_within_min_new_tokens(
        self, tokenizer: Tokenizer, min_new_tokens: int, is_found: bool
    ) -> None:
        assembler = TextAssembler(tokenizer.detokenizer(), ["\ufffd"], min_new_tokens=min_new_tokens)
        assert assembler.feed(tokenizer.encode("🧜")[0]) == ""
        assert (assembler.finish(), assembler.stop_string) == (("", "\ufffd") if is_found else ("\ufffd", None))
