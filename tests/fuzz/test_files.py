"""Whatever the files of a checkpoint contain, they are read or refused with an error that the command line shows."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.values import json_values, texts
from mpt_grpc.checkpoint import DEMO
from mpt_grpc.errors import MptServerError
from mpt_grpc.generation_config import generation_defaults
from mpt_grpc.model.adapter_config import AdapterConfig
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.weights import num_parameters, weight_files
from mpt_grpc.text.template_sources import find_chat_template
from mpt_grpc.text.tokenizer import Tokenizer

CONFIG = {
    **json.loads((DEMO / "config.json").read_text()),
    "attn_config": {
        "alibi": False,
        "rope": True,
        "rope_theta": 10000,
        "attn_type": "grouped_query_attention",
        "kv_n_heads": 2,
    },
    "ffn_config": {"ffn_type": "mptglu", "fc_type": "torch"},
    "expansion_ratio": 4,
    "logit_scale": None,
    "norm_type": "low_precision_layernorm",
}
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["Wqkv"], "rank_pattern": {"up_proj": 2}}
INDEX = {"weight_map": {"transformer.wte.weight": "model-00001-of-00001.safetensors"}}
TOKENS = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_end|>"]}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message['content'] }}{{ eos_token }}\n{% endfor %}"


def read_tokenizer(folder: Path) -> None:
    Tokenizer.from_folder(folder)
    find_chat_template("auto", folder, "model")


READERS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "config.json": (CONFIG, lambda folder: num_parameters(MPTConfig.from_file(folder / "config.json"))),
    "tokenizer_config.json": (json.loads((DEMO / "tokenizer_config.json").read_text()), read_tokenizer),
    "special_tokens_map.json": (TOKENS, read_tokenizer),
    "added_tokens.json": ({"<|im_start|>": 4096}, read_tokenizer),
    "generation_config.json": ({"temperature": 0.7, "eos_token_id": [0]}, generation_defaults),
    "model.safetensors.index.json": (INDEX, weight_files),
    "adapter_config.json": (ADAPTER, lambda folder: AdapterConfig.from_file(folder / "adapter_config.json")),
    "chat_template.jinja": (TEMPLATE, read_tokenizer),
}
fuzzed = settings(suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The files of the built-in model, without its weights."""
    with tempfile.TemporaryDirectory() as name:
        for file in DEMO.glob("*.json"):
            shutil.copy(file, name)
        yield Path(name)


def changed(draw: st.DrawFn, value: Any) -> Any:
    """Returns a value with one part replaced, added or removed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(draw, value[key])}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], changed(draw, value[place]), *value[place + 1 :]]
    if isinstance(value, dict) and draw(st.booleans()):
        return {**value, draw(texts): draw(json_values)}
    return draw(json_values)


@st.composite
def contents(draw: st.DrawFn, value: Any) -> bytes:
    """Draws a file: with changed values, a change of its bytes, or both."""
    for _ in range(draw(st.integers(0, 3))):
        value = changed(draw, value)
    content = (value if isinstance(value, str) else json.dumps(value)).encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        start = draw(st.integers(0, len(content)))
        content = content[:start] + draw(st.binary(max_size=4)) + content[start + draw(st.integers(0, 4)) :]
    return content


@fuzzed
@given(st.data())
@pytest.mark.parametrize("name", READERS)
def test_every_file_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    value, read = READERS[name]
    before = (folder / name).read_bytes() if (folder / name).exists() else None
    (folder / name).write_bytes(data.draw(contents(value)))
    try:
        read(folder)
    except MptServerError as error:
        assert "\n" not in str(error)  # noqa: PT017  # the error may be missing
    finally:
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
