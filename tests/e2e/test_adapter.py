"""`mpt-grpc serve --adapter` serves what PEFT's merged model generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import merged_by_peft, save_adapter, transformers_model
from tokenizers import Tokenizer

from mpt_grpc.checkpoint import DEMO
from mpt_grpc_client import Client

PROMPT = "Once upon a time"


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Returns the folders of two different adapters of the built-in model."""
    return [
        save_adapter(tmp_path / "rslora", transformers_model(DEMO), r=4, use_rslora=True, lora_alpha=2),
        save_adapter(tmp_path / "ffn", transformers_model(DEMO), seed=2, target_modules=["up_proj", "down_proj"]),
    ]


def test_served_tokens_are_those_of_the_model_that_peft_merges(
    adapters: list[Path], start_server: Callable[..., Any]
) -> None:
    prompt_ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(PROMPT, add_special_tokens=False).ids

    def generated_by_transformers(*adapters: Path) -> list[int]:
        oracle: Any = merged_by_peft(transformers_model(DEMO), adapters)
        tokens = oracle.generate(torch.tensor([prompt_ids]), max_new_tokens=48, do_sample=False)[0].tolist()
        return tokens[len(prompt_ids) :]

    expected = generated_by_transformers(*adapters)
    assert expected not in (generated_by_transformers(), generated_by_transformers(adapters[0]))
    server = start_server("--adapter", str(adapters[0]), "--adapter", str(adapters[1]))
    with Client(server.target, timeout=120) as client:
        served = client.generate(PROMPT, max_new_tokens=48, temperature=0, return_token_ids=True)
    assert list(served.token_ids) == expected
