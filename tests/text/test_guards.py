"""Guards hold back only text that they may block, however the text is split into pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from mpt_grpc.errors import SettingsError
from mpt_grpc.text.guards import Guard, OutputWatch, load_guards, watch_all, word_list

MakeGuard = Callable[..., Guard]


@pytest.fixture
def words(tmp_path: Path) -> MakeGuard:
    """Returns a function that makes a word list guard from lines."""

    def make(*lines: str) -> Guard:
        file = tmp_path / "words.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        return word_list(str(file))

    return make


def passed(watch: OutputWatch, pieces: Iterable[str]) -> tuple[str, bool]:
    """Returns the part of an output that is sent, and whether the output was blocked."""
    sent = "".join([watch.feed(piece) for piece in pieces] + [watch.finish()])
    return sent, watch.blocked


def result(guard: Guard, text: str) -> tuple[str, bool]:
    return passed(guard.watch(), [text])


@pytest.mark.parametrize("text", ["a fox", "Fox!", "the FOX is", "(fox)", "a\nfox\n", "fox-like"])
def test_word_matches_in_any_case_and_ends_the_text_before_it(words: MakeGuard, text: str) -> None:
    assert result(words("fox"), text) == (text[: text.lower().index("fox")], True)


@pytest.mark.parametrize("text", ["foxes", "outfox", "fox_1", "fox1", "f ox", "", "foxé"])
def test_part_of_a_word_does_not_match(words: MakeGuard, text: str) -> None:
    assert result(words("fox"), text) == (text, False)


@pytest.mark.parametrize("text", ["The red fox", "the  red\n\tfox.", "THE RED FOX"])
def test_phrase_matches_across_any_white_space(words: MakeGuard, text: str) -> None:
    assert result(words("the red fox"), text) == ("", True)
    assert result(words("the red fox"), "the red, fox") == ("the red, fox", False)


@pytest.mark.parametrize(
    ("word", "text", "expected"),
    [
        ("C++", "in C++ and", ("in ", True)),
        ("C++", "in c++", ("in ", True)),
        ("C++", "in C++x", ("in C++x", False)),
        (".net", "a .NET", ("a ", True)),
        (".net", "a.net", ("a.net", False)),
        ("$$$", "for $$$!", ("for ", True)),
        ("what?!", "What?! no", ("", True)),
        ("a|b", "a", ("a", False)),
        ("/", "and/ or", ("and/ or", False)),
        ("/", "and / or", ("and ", True)),
    ],
)
def test_special_characters_in_words_match_literally(
    words: MakeGuard, word: str, text: str, expected: tuple[str, bool]
) -> None:
    assert result(words(word), text) == expected


def test_words_with_a_common_prefix_all_match(words: MakeGuard) -> None:
    guard = words("fox", "f", "Fox trot", "fox.", "*f", "foxes")
    for text in ("a fox", "a F ", "a fox trot", "a fox.", "a *f", "a foxes!"):
        assert result(guard, text) == ("a ", True)
    assert result(guard, "a fo fog *g foxtrot") == ("a fo fog *g foxtrot", False)


def test_entry_between_slashes_is_a_case_sensitive_regular_expression(words: MakeGuard) -> None:
    guard = words(r"/[0-9]{3}-[0-9]{4}|Fox(?=es)/")
    assert result(guard, "call 555-1234 now") == ("call ", True)
    assert result(guard, "two Foxes") == ("two ", True)
    assert result(guard, "two foxes, a Fox, 55-1234") == ("two foxes, a Fox, 55-1234", False)


def test_comments_and_blank_lines_are_ignored_and_lines_are_trimmed(words: MakeGuard) -> None:
    guard = words("# animals", "", "   ", "  fox  ", "\tcrow", "#owl")
    assert result(guard, "an # animals owl") == ("an # animals owl", False)
    assert result(guard, "a crow") == result(guard, "a fox") == ("a ", True)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (("fox", "", "/a(b/"), r"words\.txt, line 3: invalid regular expression: "),
        (("/a*/",), r"words\.txt, line 1: the pattern must not match empty text"),
        (("//",), r"words\.txt, line 1: the pattern must not match empty text"),
        (("# none", ""), r"words\.txt: no words in this file"),
        ((), r"words\.txt: no words in this file"),
    ],
)
def test_error_in_a_word_file_is_reported_with_its_line(words: MakeGuard, lines: tuple[str, ...], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        words(*lines)


def test_guards_are_loaded_by_name_with_an_argument(words: MakeGuard, tmp_path: Path) -> None:
    words("fox")
    (guard,) = load_guards([f"words={tmp_path / 'words.txt'}"])
    assert result(guard, "a fox") == ("a ", True)
    assert load_guards([]) == ()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrods=a", "unknown guard 'wrods'; installed guards: .*words"),
        ("", "unknown guard ''"),
        ("words=none.txt", r"cannot create words with the argument 'none\.txt': .*No such file"),
        ("words", "cannot create words with the argument ''"),
    ],
)
def test_guard_that_cannot_be_loaded_raises_settings_error(name: str, why: str) -> None:
    with pytest.raises(SettingsError, match=f"--guard: {why}"):
        load_guards([name])


def test_third_party_guard_is_found_through_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting_guard.py").write_text(
        "class Shouting:\n"
        "    def __init__(self, argument): self.argument, self.blocked = argument, False\n"
        "    def refusal(self, prompt): return 'too loud' if prompt.isupper() else None\n"
        "    def watch(self): return self\n"
        "    def feed(self, text): return text + self.argument\n"
        "    def finish(self): return ''\n"
        "def broken(argument): raise RuntimeError('no licence')\n"
    )
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mpt_grpc.guards]\nshouting = shouting_guard:Shouting\nbroken = shouting_guard:broken\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (guard,) = load_guards(["shouting=a=b"])
    assert guard.refusal("AAA") == "too loud"
    assert result(guard, "x") == ("xa=b", False)
    with pytest.raises(SettingsError, match="cannot create broken with the argument '': no licence"):
        load_guards(["broken"])
    with pytest.raises(SettingsError, match="installed guards: broken, shouting, words"):
        load_guards(["loud"])


def test_prompt_is_rejected_without_revealing_the_word(words: MakeGuard) -> None:
    guard = words("fox")
    assert guard.refusal("the crow") is guard.refusal("") is guard.refusal("foxes") is None
    for prompt in ("fox", "the fox", "A Fox is"):
        refusal = guard.refusal(prompt)
        assert refusal is not None
        assert "fox" not in refusal


@pytest.mark.parametrize("num_characters", range(16_374, 16_388))
def test_long_prompt_is_checked_across_piece_boundaries(words: MakeGuard, num_characters: int) -> None:
    guard = words("red fox")
    crowd = "x" * num_characters
    assert guard.refusal(f"{crowd}! red fox")
    assert guard.refusal(f"{crowd}! red foxes") is None


@pytest.mark.parametrize(
    ("pieces", "sent"),
    [
        # The start of a word is held back until the rest arrives, and the word until the next character does.
        (["a", " ", "f", "o", "x", "e", "s"], ["a", " ", "", "", "", "foxe", "s"]),
        (["the crow, ", "the owl"], ["the crow, ", "the owl"]),
        (["fo", "g"], ["", "fog"]),
        (["outf", "ox "], ["outf", "ox "]),
        (["red fire", "f"], ["red fire", "f"]),
        (["two red", " \n ", "dogs"], ["two ", "", "red \n dogs"]),
    ],
)
def test_text_that_cannot_start_a_match_is_returned_at_once(
    words: MakeGuard, pieces: list[str], sent: list[str]
) -> None:
    watch = words("fox", "red fox").watch()
    assert [watch.feed(piece) for piece in pieces] == sent
    assert (watch.finish(), watch.blocked) == ("", False)


def test_finish_decides_on_the_text_held_back(words: MakeGuard) -> None:
    guard = words("fox", "red fox")
    for text, rest, blocked in (("a fo", "fo", False), ("a red ", "red ", False), ("a fox", "", True)):
        watch = guard.watch()
        assert watch.feed(text) == "a "
        assert not watch.blocked
        assert (watch.finish(), watch.blocked) == (rest, blocked)


def test_no_text_is_returned_after_a_match(words: MakeGuard) -> None:
    watch = words("fox").watch()
    assert (watch.feed("a fox "), watch.blocked) == ("a ", True)
    assert (watch.feed("and more"), watch.finish(), watch.blocked) == ("", "", True)


def test_lookbehind_sees_text_already_sent(words: MakeGuard) -> None:
    guard = words(r"/(?<=password: )\w+/")
    assert passed(guard.watch(), ["the pass", "word", ": ", "hun", "ter", "2 "]) == ("the password: ", True)
    assert passed(guard.watch(), ["the ", "hun", "ter"]) == ("the hunter", False)
    assert passed(words("fox").watch(), ["out", "fox"]) == ("outfox", False)


def test_pattern_that_takes_too_long_blocks_the_output(words: MakeGuard) -> None:
    watch = words("/(a|aa)+$b/").watch()
    assert passed(watch, ["b" + "a" * 60 + "c"])[1]


def test_watches_of_one_guard_are_independent(words: MakeGuard) -> None:
    guard = words("fox")
    one, other = guard.watch(), guard.watch()
    one.feed("a fox!")
    assert one.blocked
    assert passed(other, ["a crow"]) == ("a crow", False)


def test_each_of_several_guards_can_end_the_text(words: MakeGuard) -> None:
    guards = (words("fox"), words("fox trot", "crow"), words("owl"))
    assert passed(watch_all(guards), ["an ant, an ", "ow", "l ", "and a fox"]) == ("an ant, an ", True)
    assert passed(watch_all(guards), ["a cr", "ow"]) == ("a ", True)
    assert passed(watch_all(guards), ["a fo", "x"]) == ("a ", True)
    assert passed(watch_all(guards), ["a fo", "g, a cr"]) == ("a fog, a cr", False)
    assert passed(watch_all(guards[:1]), ["a fo", "x"]) == ("a ", True)
    assert passed(watch_all(()), ["a fo", "x"]) == ("a fox", False)


ENTRIES = [
    ("ab",),
    ("ab", "ab ba", "b"),
    ("a b", "b a a"),
    ("a!", "!b"),
    ("/ab+a/",),
    ("/a|ba/", "/b b/"),
    ("/(?<=b)a/",),
    ("/b(?=a)/",),
    ("/[ab]{3}/", "!"),
    ("/a.*b/",),
]


@pytest.mark.parametrize("entries", ENTRIES, ids=" ".join)
@given(pieces=st.lists(st.text("abB !\n", max_size=5), max_size=8))
def test_text_ends_before_the_first_match_however_it_is_split(
    entries: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory, pieces: list[str]
) -> None:
    file = tmp_path_factory.getbasetemp() / "words.txt"
    file.write_text("\n".join(entries))
    oracle = [
        entry[1:-1]
        if entry.startswith("/")
        else r"(?i)(?<!\w)" + r"\s+".join(map(regex.escape, entry.split())) + r"(?!\w)"
        for entry in entries
    ]
    text = "".join(pieces)
    starts = [match.start() for pattern in oracle if (match := regex.search(pattern, text, regex.V1))]
    watch = word_list(str(file)).watch()
    end = min(starts, default=len(text))
    sent = ""
    for piece in pieces:
        sent += watch.feed(piece)
        # No part of a match may be sent at any time.
        assert text[:end].startswith(sent)
    assert (sent + watch.finish(), watch.blocked) == (text[:end], bool(starts))


SPLIT_PATTERNS = [
    (r"/AKIA\B\w+/", "x AKIA1 y"),
    (r"/password:\s?\bhunter/", "the password: hunter2"),
    (r"/\bsecret\b/", "no secrets, a secret, secret"),
    (r"/\mkey\M/", "monkey key"),
    ("/(a)(b)\\2/\n/(c)\\1/", "x cc y abb"),
    ("/x.*y/\n/foo/", "ax foo by"),
    (r"/x.*y|foo/", "ax foo by"),
    (r"/[\b\]]z/", "a]z"),
]


@pytest.mark.parametrize(("entries", "text"), SPLIT_PATTERNS)
def test_word_boundaries_and_groups_do_not_depend_on_how_the_text_is_split(
    entries: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "list.txt"
    path.write_text(entries, encoding="utf-8")
    guard = word_list(str(path))

    def passed_pieces(pieces: list[str]) -> tuple[str, bool]:
        watch = guard.watch()
        sent = "".join(watch.feed(piece) for piece in pieces) + watch.finish()
        return sent, watch.blocked

    whole = passed_pieces([text])
    assert whole[1]
    assert passed_pieces(list(text)) == whole
    for cut in range(len(text)):
        assert passed_pieces([text[:cut], text[cut:]]) == whole


@pytest.mark.parametrize("entry", [r"/foo\Kbar/", r"/\Gfoo/", "/(?:foo){e<=1}/"])
def test_patterns_that_depend_on_how_the_text_is_split_are_rejected(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(entry, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"line 1: .* not supported"):
        word_list(str(path))
