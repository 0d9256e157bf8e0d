"""The `config.json` of a checkpoint as transformers takes it: since version 5, it refuses the integer 6 for 6.0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from transformers import MptConfig


def peer_config(raw: Mapping[str, Any]) -> MptConfig:
    """Returns the configuration with each number of the type that its field has in transformers."""
    from transformers import MptConfig
    from transformers.models.mpt.configuration_mpt import MptAttentionConfig

    attention = raw.get("attn_config")
    if isinstance(attention, Mapping):
        raw = {**raw, "attn_config": _typed(attention, MptAttentionConfig)}
    return MptConfig.from_dict(_typed(raw, MptConfig))


def _typed(values: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    types = {field.name: field.type for field in fields(config_class)}
    return {name: _converted(value, types.get(name)) for name, value in values.items()}


def _converted(value: Any, wanted: Any) -> Any:
    accepted = get_args(wanted) or (wanted,)
    if type(value) is int and float in accepted and int not in accepted:
        return float(value)
    if type(value) is float and value.is_integer() and int in accepted and float not in accepted:
        return int(value)
    return value
