"""Access tokens, in files."""

from __future__ import annotations

import hashlib
from pathlib import Path

SECRETS = {name: f"mpt-{name}-{'x' * 32}" for name in ("alice", "bob", "eve", "root")}
"""The tokens of callers by name."""


def entry(token: str, name: str, *roles: str, **fields: str) -> str:
    """Returns the entry of a token; `fields` are further ones in TOML."""
    quoted = ", ".join(f'"{role}"' for role in roles or ("generate",))
    values = {"name": f'"{name}"', "sha256": f'"{hashlib.sha256(token.encode()).hexdigest()}"', "roles": f"[{quoted}]"}
    lines = "\n".join(f"{key} = {value}" for key, value in {**values, **fields}.items())
    return f"[[tokens]]\n{lines}\n"


def write(file: Path, *entries: str) -> Path:
    """Writes a tokens file. Without entries, it has those of `SECRETS`: eve may only observe, and root everything."""
    roles = {"eve": ("observe",), "root": ("generate", "observe", "admin")}
    default = [entry(token, name, *roles.get(name, ())) for name, token in SECRETS.items()]
    file.write_text("\n".join(entries or default), encoding="utf-8")
    return file
