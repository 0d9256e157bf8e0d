"""Access tokens: which are accepted, how their file is read, and what is wrong with it."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
from access_tokens import SECRETS, entry, write

from mpt_grpc.access import MAX_TOKENS, Access
from mpt_grpc.caller import ALL_ROLES, Caller, Quota, Role
from mpt_grpc.errors import SettingsError, UnauthenticatedError

ALICE = f"Bearer {SECRETS['alice']}"


def caller_of(access: Access, token: str) -> Caller:
    caller = access.token_caller(f"Bearer {token}")
    assert caller is not None
    return caller


@pytest.mark.parametrize("authorization", [ALICE, ALICE.replace("Bearer", "bearer"), ALICE.replace(" ", "  ")])
def test_a_token_names_its_caller_with_its_roles(authorization: str, tmp_path: Path) -> None:
    access = Access(write(tmp_path / "tokens.toml"))
    caller = access.token_caller(authorization)
    assert caller is not None
    assert (caller.name, caller.roles) == ("alice", {Role.GENERATE})
    assert caller_of(access, SECRETS["root"]).roles == ALL_ROLES


@pytest.mark.parametrize(
    ("authorization", "why"),
    [
        (None, "an access token is required: send it as 'authorization: Bearer TOKEN'"),
        ("", "an access token is required"),
        (SECRETS["alice"], "the authorization is not of the form 'Bearer TOKEN'"),
        ("Basic abc", "the authorization is not of the form 'Bearer TOKEN'"),
        (f"{ALICE} x", "the authorization is not of the form 'Bearer TOKEN'"),
        (f"{ALICE}x", "the access token is not valid"),
        (ALICE[:-1], "the access token is not valid"),
    ],
)
def test_without_a_valid_token_there_is_no_caller(authorization: str | None, why: str, tmp_path: Path) -> None:
    access = Access(write(tmp_path / "tokens.toml"))
    with pytest.raises(UnauthenticatedError, match=f"^{why}"):
        access.token_caller(authorization)


def test_several_tokens_of_a_caller_are_valid_until_they_expire(tmp_path: Path) -> None:
    old = entry("old", "alice", expires="2020-01-01T00:00:00Z")
    current = entry("current", "alice", expires="2999-01-01T00:00:00+02:00")
    access = Access(write(tmp_path / "tokens.toml", old, current, entry("new", "alice")))
    assert caller_of(access, "current") == caller_of(access, "new")
    with pytest.raises(UnauthenticatedError, match="the access token of alice expired at 2020-01-01T00:00:00"):
        caller_of(access, "old")


def test_the_example_in_the_documentation_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "tokens.toml").write_text(example, encoding="utf-8")
    Access(tmp_path / "tokens.toml")


def test_a_quota_is_that_of_all_tokens_of_a_caller(tmp_path: Path) -> None:
    quota = "[quotas.alice]\nmax_requests = 2\ntokens_per_minute = 100\n"
    access = Access(write(tmp_path / "tokens.toml", entry("a", "alice"), entry("b", "alice"), entry("c", "bob"), quota))
    assert caller_of(access, "a").quota == caller_of(access, "b").quota == Quota(2, 100)
    assert caller_of(access, "c").quota == Quota()


def test_without_a_file_a_certificate_names_the_caller_and_others_are_anonymous() -> None:
    access = Access()
    assert access.token_caller(ALICE) is None
    assert access.certified_caller(None) == Caller()
    certified = access.certified_caller("alice")
    assert (certified.name, certified.roles) == ("alice", {Role.GENERATE, Role.OBSERVE})


def test_a_caller_has_a_cache_salt_that_others_cannot_know(tmp_path: Path) -> None:
    access = Access(write(tmp_path / "tokens.toml"))
    salts = [caller_of(access, SECRETS[name]).cache_salt for name in ("alice", "alice", "bob")]
    assert salts[0] == salts[1] != salts[2]
    assert caller_of(Access(tmp_path / "tokens.toml"), SECRETS["alice"]).cache_salt != salts[0]
    assert access.certified_caller(None).cache_salt == ""


def test_a_change_of_the_file_takes_effect_and_a_broken_one_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "mpt_grpc")
    file = write(tmp_path / "tokens.toml")
    access = Access(file)
    write(file, entry("new", "alice"))
    access.refresh()
    assert caller_of(access, "new").name == "alice"
    with pytest.raises(UnauthenticatedError):
        caller_of(access, SECRETS["alice"])
    assert not caplog.records

    for broken in ("[[tokens]", "a = " + 5000 * "["):
        file.write_text(broken, encoding="utf-8")
        for _ in range(2):
            access.refresh()
            assert caller_of(access, "new").name == "alice"
    file.write_text("", encoding="utf-8")  # as while it is written
    access.refresh()
    assert caller_of(access, "new").name == "alice"
    file.unlink()
    access.refresh()
    assert caller_of(access, "new").name == "alice"
    os.mkfifo(file)
    access.refresh()
    assert caller_of(access, "new").name == "alice"
    *others, empty, missing, pipe = messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" is not TOML: ")[0] for message in others] == 2 * [f"--tokens-file: {file}"]
    assert empty.startswith(f"--tokens-file: {file} is empty: ")
    assert missing.startswith(f"--tokens-file: cannot read {file}: No such file")
    assert pipe.startswith(f"--tokens-file: {file} is not a regular file; ")
    assert all(message.endswith("the previous content stays in effect") for message in messages)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("quotas = 3", r"quotas: write \[quotas.NAME\] before each quota"),
        (entry("a", "a") + "[quotas.b]", "quotas.b: no token has this name"),
        (entry("a", "a") + "[quotas.a]\nx = 1", "quotas.a.x: unknown; use max_requests or tokens_per_minute"),
        (
            entry("a", "a") + "[quotas.a]\nmax_requests = 0",
            "quotas.a.max_requests: a number from 1 to 1000000000000 is required",
        ),
        ("tokens = 3", r"tokens: write \[\[tokens\]\] before each token"),
        (entry("a", "a") + f"[quotas.a]\ntokens_per_minute = {10**400}", "tokens_per_minute: a number from 1 to"),
        (entry("a", "a").replace('"a"', "5", 1), r"tokens\[0\].name: 1 to 64 letters"),
        (entry("a", "a").replace('"a"', '["a"]', 1) + "[quotas.a]", r"tokens\[0\].name: .*; quotas.a: no token"),
        ('[[tokens]]\nsha256 = ["12"]', r"tokens\[0\].sha256: 64 hexadecimal digits"),
        (f"[[tokens]]\nsha256 = {'1' * 64}", r"tokens\[0\].sha256: 64 hexadecimal digits"),
        ("token = []", r"token: unknown; the file consists of \[\[tokens\]\] and \[quotas.NAME\]"),
        ("[[tokens]]\nrole = 1", r"tokens\[0\].role: unknown; use name, sha256, roles, expires"),
        (entry("a", "a b"), r"tokens\[0\].name: 1 to 64 letters, digits and ._@- are required"),
        ('[[tokens]]\nname = "a"\nsha256 = "12"', r"tokens\[0\].sha256: 64 hexadecimal digits"),
        (
            entry("a", "a") + entry("b", "b", "rule"),
            r"tokens\[1\].roles: a list of generate, observe, admin is required",
        ),
        (entry("a", "a", expires="2027-01-01"), r"tokens\[0\].expires: a time with its offset is required"),
        (entry("a", "a", expires="2027-01-01T00:00:00"), r"tokens\[0\].expires: a time with its offset is required"),
        (entry("a", "a") + entry("a", "b"), r"tokens\[1\].sha256: is that of tokens\[0\]"),
        ("\n".join(entry(str(n), "a") for n in range(MAX_TOKENS + 1)), "tokens: 1001; at most 1000 are allowed"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=f"^--tokens-file: {file}: .*{problem}"):
        Access(file)
