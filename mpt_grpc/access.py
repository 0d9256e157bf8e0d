"""Who may call: access tokens, whose hashes are in a file, and certificates of clients.

An access token is the secret of a caller. It has nothing to do with the tokens of a text.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpt_grpc.caller import ANONYMOUS, UNLIMITED, Caller, Quota, Role
from mpt_grpc.errors import PermissionDeniedError, SettingsError, UnauthenticatedError
from mpt_grpc.file_value import FileValue, read_file

MAX_TOKENS = 1000
"""The maximum number of tokens in a file: a call compares its token with all of them."""
CERTIFIED_NAME = "mpt-grpc-certified-name-bin"
"""The metadata by which a gateway in the server's process passes on the name in the certificate of its caller."""
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_NAME_RULE = "1 to 64 letters, digits and ._@- are required"
_SHA256 = re.compile("[0-9a-f]{64}")
_MAX_QUOTA = 10**12
_BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)
_CERTIFIED = frozenset({Role.GENERATE, Role.OBSERVE})


@dataclass(frozen=True)
class AccessToken:
    """What the server knows of an access token."""

    digest: bytes
    """The SHA-256 of the token."""
    caller: Caller
    """Whose token it is; a caller may have several."""
    expires: datetime | None


class Access:
    """Identifies callers."""

    def __init__(self, tokens_file: Path | None = None) -> None:
        """tokens_file: the tokens that callers need; None accepts all callers. Raises SettingsError."""
        self._salt_key = secrets.token_bytes(32)
        self._tokens = None if tokens_file is None else FileValue([tokens_file], lambda: self._read(tokens_file))

    @property
    def requires_token(self) -> bool:
        return self._tokens is not None

    def refresh(self) -> None:
        """Reads the tokens again if their file has changed, which takes a while if there are many."""
        if self._tokens is not None:
            self._tokens.refresh()

    def token_caller(self, authorization: str | None) -> Caller | None:
        """Returns the caller whose token is in the header `authorization`; None if no token is required.

        Raises UnauthenticatedError.
        """
        return None if self._tokens is None else _find(self._tokens.value, authorization)

    def certified_caller(self, name: str | None) -> Caller:
        """Returns the caller with this name in its certificate, which may be empty; None is without a certificate."""
        return ANONYMOUS if name is None else Caller(name, _CERTIFIED, self._salt(name))

    def _read(self, file: Path) -> tuple[AccessToken, ...]:
        content = _content(file)
        quotas = {name: Quota(**quota) for name, quota in content.get("quotas", {}).items()}
        return tuple(
            AccessToken(
                bytes.fromhex(token["sha256"]),
                Caller(
                    token["name"],
                    frozenset(map(Role, token["roles"])),
                    self._salt(token["name"]),
                    quotas.get(token["name"], UNLIMITED),
                ),
                token.get("expires"),
            )
            for token in content.get("tokens", [])
        )

    def _salt(self, name: str) -> str:
        return hmac.digest(self._salt_key, name.encode(), "sha256").hex()


def check_role(caller: Caller, accepted: Sequence[Role]) -> None:
    """Raises PermissionDeniedError unless the caller has one of the roles."""
    if caller.roles.isdisjoint(accepted):
        raise PermissionDeniedError(f"{caller.name} lacks the role {' or '.join(accepted)}")


def _find(tokens: Sequence[AccessToken], authorization: str | None) -> Caller:
    if not authorization:
        raise UnauthenticatedError("an access token is required: send it as 'authorization: Bearer TOKEN'")
    if (match := _BEARER.fullmatch(authorization)) is None:
        raise UnauthenticatedError("the authorization is not of the form 'Bearer TOKEN'")
    digest = token_digest(match[1])
    # All are compared, so that the time says nothing about them.
    found = [token for token in tokens if hmac.compare_digest(token.digest, digest)]
    if not found:
        raise UnauthenticatedError("the access token is not valid")
    if (expires := found[0].expires) is not None and expires <= datetime.now(UTC):
        raise UnauthenticatedError(f"the access token of {found[0].caller.name} expired at {expires.isoformat()}")
    return found[0].caller


def token_digest(token: str) -> bytes:
    """Returns the SHA-256 of a token, which needs no salt, since tokens are random."""
    return hashlib.sha256(token.encode()).digest()


def check_name(name: str) -> None:
    """Raises SettingsError if a caller cannot have this name."""
    if not _NAME.fullmatch(name):
        raise SettingsError(f"NAME: {_NAME_RULE}")


def _content(file: Path) -> dict[str, Any]:
    """Returns the content of a file. Raises SettingsError with everything that is wrong with it."""
    data = read_file(file, "--tokens-file")
    try:
        text = data.decode()
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"--tokens-file: {file} is not TOML: {error}") from error
    if not text.strip():  # as for a moment while it is written
        raise SettingsError(f"--tokens-file: {file} is empty: write 'tokens = []' to allow no token")
    tokens, quotas = content.get("tokens", []), content.get("quotas", {})
    if problems := [*_structure_problems(content)] or [*_token_problems(tokens), *_quota_problems(quotas, tokens)]:
        raise SettingsError(f"--tokens-file: {file}: {'; '.join(problems)}")
    return content


def _structure_problems(content: Mapping[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if key == "tokens":
            if not (isinstance(value, list) and all(isinstance(token, dict) for token in value)):
                yield "tokens: write [[tokens]] before each token"
            elif len(value) > MAX_TOKENS:
                yield f"tokens: {len(value)}; at most {MAX_TOKENS} are allowed"
        elif key == "quotas":
            if not (isinstance(value, dict) and all(isinstance(quota, dict) for quota in value.values())):
                yield "quotas: write [quotas.NAME] before each quota"
        else:
            yield f"{key}: unknown; the file consists of [[tokens]] and [quotas.NAME]"


def _token_problems(tokens: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens):
        yield from (f"tokens[{number}].{problem}" for problem in _problems(token))
        if (first := seen.setdefault(str(token.get("sha256")), number)) != number:
            yield f"tokens[{number}].sha256: is that of tokens[{first}]"


def _problems(token: Mapping[str, Any]) -> Iterator[str]:
    known = ("name", "sha256", "roles", "expires")
    yield from (f"{key}: unknown; use {', '.join(known)}" for key in token if key not in known)
    if not _matches(_NAME, token.get("name")):
        yield f"name: {_NAME_RULE}"
    if not _matches(_SHA256, token.get("sha256")):
        yield "sha256: 64 hexadecimal digits in lower case are required"
    roles = token.get("roles")
    if not isinstance(roles, list) or not roles or not set(map(str, roles)) <= set(Role):
        yield f"roles: a list of {', '.join(Role)} is required"
    expires = token.get("expires")
    if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo):
        yield "expires: a time with its offset is required, such as 2027-01-01T00:00:00Z"


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _quota_problems(quotas: Mapping[str, Mapping[str, Any]], tokens: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    known = [field.name for field in fields(Quota)]
    names = [token.get("name") for token in tokens]
    for name, quota in quotas.items():
        if name not in names:
            yield f"quotas.{name}: no token has this name"
        for key, value in quota.items():
            if key not in known:
                yield f"quotas.{name}.{key}: unknown; use {' or '.join(known)}"
            elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_QUOTA:
                yield f"quotas.{name}.{key}: a number from 1 to {_MAX_QUOTA} is required"
