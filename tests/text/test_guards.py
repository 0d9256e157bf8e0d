"""Guards hold back what they may object to and nothing else, wherever the text is cut."""

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
    """A guard of a file with these lines."""

    def make(*lines: str) -> Guard:
        file = tmp_path / "words.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        return word_list(str(file))

    return make


def passed(watch: OutputWatch, pieces: Iterable[str]) -> tuple[str, bool]:
    """What of an output is sent, and whether it was blocked."""
    sent = "".join([watch.feed(piece) for piece in pieces] + [watch.finish()])
    return sent, watch.blocked


def result(guard: Guard, text: str) -> tuple[str, bool]:
    return passed(guard.watch(), [text])


@pytest.mark.parametrize("text", ["a fox", "Fox!", "the FOX is", "(fox)", "a\nfox\n", "fox-like"])
def test_a_word_is_met_whole_in_any_case_and_ends_the_text_before_it(words: MakeGuard, text: str) -> None:
    assert result(words("fox"), text) == (text[: text.lower().index("fox")], True)


@pytest.mark.parametrize("text", ["foxes", "outfox", "fox_1", "fox1", "f ox", "", "foxé"])
def test_a_part_of_a_word_is_not_met(words: MakeGuard, text: str) -> None:
    assert result(words("fox"), text) == (text, False)


@pytest.mark.parametrize("text", ["The red fox", "the  red\n\tfox.", "THE RED FOX"])
def test_a_phrase_is_met_over_any_white_space(words: MakeGuard, text: str) -> None:
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
def test_a_words_signs_stand_for_themselves(words: MakeGuard, word: str, text: str, expected: tuple[str, bool]) -> None:
    assert result(words(word), text) == expected


def test_of_words_that_begin_alike_each_is_met(words: MakeGuard) -> None:
    guard = words("fox", "f", "Fox trot", "fox.", "*f", "foxes")
    for text in ("a fox", "a F ", "a fox trot", "a fox.", "a *f", "a foxes!"):
        assert result(guard, text) == ("a ", True)
    assert result(guard, "a fo fog *g foxtrot") == ("a fo fog *g foxtrot", False)


def test_between_slashes_stands_a_regular_expression_that_minds_the_case(words: MakeGuard) -> None:
    guard = words(r"/[0-9]{3}-[0-9]{4}|Fox(?=es)/")
    assert result(guard, "call 555-1234 now") == ("call ", True)
    assert result(guard, "two Foxes") == ("two ", True)
    assert result(guard, "two foxes, a Fox, 55-1234") == ("two foxes, a Fox, 55-1234", False)


def test_comments_and_blank_lines_are_passed_over_and_lines_are_trimmed(words: MakeGuard) -> None:
    guard = words("# animals", "", "   ", "  fox  ", "\tcrow", "#owl")
    assert result(guard, "an # animals owl") == ("an # animals owl", False)
    assert result(guard, "a crow") == result(guard, "a fox") == ("a ", True)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (("fox", "", "/a(b/"), r"words\.txt, line 3: not a regular expression: "),
        (("/a*/",), r"words\.txt, line 1: it matches where nothing stands"),
        (("//",), r"words\.txt, line 1: it matches where nothing stands"),
        (("# none", ""), r"words\.txt: it has no words"),
        ((), r"words\.txt: it has no words"),
    ],
)
def test_a_file_with_a_mistake_is_an_error_with_its_place(words: MakeGuard, lines: tuple[str, ...], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        words(*lines)


def test_guards_are_found_by_their_names_with_arguments(words: MakeGuard, tmp_path: Path) -> None:
    words("fox")
    (guard,) = load_guards([f"words={tmp_path / 'words.txt'}"])
    assert result(guard, "a fox") == ("a ", True)
    assert load_guards([]) == ()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrods=a", "no guard 'wrods' is installed; there are .*words"),
        ("", "no guard '' is installed"),
        ("words=none.txt", r"words cannot be made from 'none\.txt': .*No such file"),
        ("words", "words cannot be made from ''"),
    ],
)
def test_a_guard_that_cannot_be_had_is_an_error_of_the_settings(name: str, why: str) -> None:
    with pytest.raises(SettingsError, match=f"--guard: {why}"):
        load_guards([name])


def test_a_guard_of_another_package_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with pytest.raises(SettingsError, match="broken cannot be made from '': no licence"):
        load_guards(["broken"])
    with pytest.raises(SettingsError, match="there are broken, shouting, words"):
        load_guards(["loud"])


def test_a_prompt_is_refused_without_telling_the_word(words: MakeGuard) -> None:
    guard = words("fox")
    assert guard.refusal("the crow") is guard.refusal("") is guard.refusal("foxes") is None
    for prompt in ("fox", "the fox", "A Fox is"):
        refusal = guard.refusal(prompt)
        assert refusal is not None
        assert "fox" not in refusal


@pytest.mark.parametrize("num_characters", range(16_374, 16_388))
def test_a_long_prompt_is_judged_as_one(words: MakeGuard, num_characters: int) -> None:
    guard = words("red fox")
    crowd = "x" * num_characters
    assert guard.refusal(f"{crowd}! red fox")
    assert guard.refusal(f"{crowd}! red foxes") is None


@pytest.mark.parametrize(
    ("pieces", "sent"),
    [
        # A word's beginning waits for the rest, and for what tells that the word has ended.
        (["a", " ", "f", "o", "x", "e", "s"], ["a", " ", "", "", "", "foxe", "s"]),
        (["the crow, ", "the owl"], ["the crow, ", "the owl"]),
        (["fo", "g"], ["", "fog"]),
        (["outf", "ox "], ["outf", "ox "]),
        (["red fire", "f"], ["red fire", "f"]),
        (["two red", " \n ", "dogs"], ["two ", "", "red \n dogs"]),
    ],
)
def test_text_that_cannot_begin_a_match_comes_out_at_once(words: MakeGuard, pieces: list[str], sent: list[str]) -> None:
    watch = words("fox", "red fox").watch()
    assert [watch.feed(piece) for piece in pieces] == sent
    assert (watch.finish(), watch.blocked) == ("", False)


def test_the_end_decides_on_what_was_held_back(words: MakeGuard) -> None:
    guard = words("fox", "red fox")
    for text, rest, blocked in (("a fo", "fo", False), ("a red ", "red ", False), ("a fox", "", True)):
        watch = guard.watch()
        assert watch.feed(text) == "a "
        assert not watch.blocked
        assert (watch.finish(), watch.blocked) == (rest, blocked)


def test_after_a_match_nothing_comes_out(words: MakeGuard) -> None:
    watch = words("fox").watch()
    assert (watch.feed("a fox "), watch.blocked) == ("a ", True)
    assert (watch.feed("and more"), watch.finish(), watch.blocked) == ("", "", True)


def test_a_pattern_sees_what_was_sent_before(words: MakeGuard) -> None:
    guard = words(r"/(?<=password: )\w+/")
    assert passed(guard.watch(), ["the pass", "word", ": ", "hun", "ter", "2 "]) == ("the password: ", True)
    assert passed(guard.watch(), ["the ", "hun", "ter"]) == ("the hunter", False)
    assert passed(words("fox").watch(), ["out", "fox"]) == ("outfox", False)


def test_a_pattern_that_takes_too_long_blocks(words: MakeGuard) -> None:
    watch = words("/(a|aa)+$b/").watch()
    assert passed(watch, ["b" + "a" * 60 + "c"])[1]


def test_watches_of_one_guard_do_not_know_each_other(words: MakeGuard) -> None:
    guard = words("fox")
    one, other = guard.watch(), guard.watch()
    one.feed("a fox!")
    assert one.blocked
    assert passed(other, ["a crow"]) == ("a crow", False)


def test_several_guards_each_end_the_text(words: MakeGuard) -> None:
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
def test_any_cut_ends_the_text_where_the_whole_text_has_its_first_match(
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
        # At no moment anything of a match is out.
        assert text[:end].startswith(sent)
    assert (sent + watch.finish(), watch.blocked) == (text[:end], bool(starts))


CUT_PATTERNS = [
    (r"/AKIA\B\w+/", "x AKIA1 y"),
    (r"/password:\s?\bhunter/", "the password: hunter2"),
    (r"/\bsecret\b/", "no secrets, a secret, secret"),
    (r"/\mkey\M/", "monkey key"),
    ("/(a)(b)\\2/\n/(c)\\1/", "x cc y abb"),
    ("/x.*y/\n/foo/", "ax foo by"),
    (r"/x.*y|foo/", "ax foo by"),
    (r"/[\b\]]z/", "a]z"),
]


@pytest.mark.parametrize(("entries", "text"), CUT_PATTERNS)
def test_borders_and_groups_are_judged_the_same_wherever_the_text_is_cut(
    entries: str, text: str, tmp_path: Path
) -> None:
    path = tmp_path / "list.txt"
    path.write_text(entries, encoding="utf-8")
    guard = word_list(str(path))

    def told(pieces: list[str]) -> tuple[str, bool]:
        watch = guard.watch()
        sent = "".join(watch.feed(piece) for piece in pieces) + watch.finish()
        return sent, watch.blocked

    whole = told([text])
    assert whole[1]
    assert told(list(text)) == whole
    for cut in range(len(text)):
        assert told([text[:cut], text[cut:]]) == whole


@pytest.mark.parametrize("entry", [r"/foo\Kbar/", r"/\Gfoo/", "/(?:foo){e<=1}/"])
def test_what_depends_on_the_cut_is_refused_when_the_list_is_read(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(entry, encoding="utf-8")
    with pytest.raises(SettingsError, match=r"line 1: .* not supported"):
        word_list(str(path))
