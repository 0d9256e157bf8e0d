"""Added tokens for which the model has no embedding, as fine-tuning leaves them: all but these are served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import demo_settings, generation

from mpt_grpc.checkpoint import DEMO
from mpt_grpc.conversation import Conversation, Message
from mpt_grpc.engine.load import load_engine
from mpt_grpc.errors import InvalidRequestError, ModelError
from mpt_grpc.server.server import running_server
from mpt_grpc.settings import ModelSettings, Settings
from mpt_grpc_client import AsyncClient
from mpt_grpc_client import InvalidRequestError as InvalidOptionError

NUM_ROWS = 4096
CONFIG = json.dumps(json.loads((DEMO / "config.json").read_text()) | {"eos_token_id": None})
TEMPLATE = "[PAD]{{ messages[0].content }}"


def settings(folder: Path, *, in_vocabulary: bool = False, **files: str) -> Settings:
    """Returns settings for the built-in model with one token more than its embedding has rows."""
    shutil.copytree(DEMO, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if in_vocabulary:
        tokenizer["model"]["vocab"]["[PAD]"] = NUM_ROWS
    else:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": NUM_ROWS, "content": "[PAD]", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    model = ModelSettings(str(folder), device="cpu", dtype="float32", chat_template=TEMPLATE)
    return replace(demo_settings(64), model=model)


def test_a_token_that_the_model_lacks_is_refused_in_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = load_engine(settings(tmp_path / "m"))
    assert "lacks tokens of its tokenizer: prompts with [PAD] are refused" in caplog.text
    with engine:
        assert engine.preparation.limits.vocab_size == NUM_ROWS
        request = generation("a", max_new_tokens=4, stop=("[PAD]",))
        stopping = replace(request.stopping, min_new_tokens=4)  # which forbids the stop tokens
        assert len(engine.generate(replace(request, stopping=stopping)).token_ids) == 4
        conversation = Conversation((Message("user", "Once"),))
        for prompt, field, remedy in (
            ("Once [PAD]", "text", "remove it"),
            (conversation, "conversation.messages", "use messages and a chat template without it"),
        ):
            with pytest.raises(InvalidRequestError) as refused:
                engine.generate(generation("b", prompt))
            (violation,) = refused.value.violations
            assert violation.field == field
            assert violation.description == f"'[PAD]' is a token that the model lacks: {remedy}"
        with pytest.raises(InvalidRequestError, match="4096 is not a token ID: IDs are below 4096"):
            engine.generate(generation("c", (1, NUM_ROWS)))


def test_a_token_that_the_model_lacks_may_be_where_a_prompt_is_cut_off(tmp_path: Path) -> None:
    engine, _ = load_engine(settings(tmp_path / "m"))
    with engine:
        for prompt in ("[PAD] Once upon a time", (NUM_ROWS, 5, 6, 7)):
            request = generation("a", prompt, max_new_tokens=1)
            assert len(engine.generate(replace(request, truncate_prompt_tokens=2)).token_ids) == 1


async def test_a_token_that_the_model_lacks_is_turned_into_an_id_and_back(tmp_path: Path) -> None:
    text = "Once [PAD] upon"
    async with running_server(settings(tmp_path / "m")) as server, AsyncClient(server.target) as client:
        token_ids = [token.token_id for token in await client.tokenize(text)]
        assert NUM_ROWS in token_ids
        assert await client.detokenize(token_ids, skip_special_tokens=False) == text
        assert await client.detokenize(token_ids) == "Once  upon"
        with pytest.raises(InvalidOptionError, match=r"token_ids\[0\]: 4097 is not a token ID: IDs are below 4097"):
            await client.detokenize([NUM_ROWS + 1])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"generation_config": '{"eos_token_id": 4096}'},
            r"generation_config\.json: eos_token_id must be .* below 4096",
        ),
        (
            {"config": CONFIG, "generation_config": "{}", "tokenizer_config": '{"eos_token": "[PAD]"}'},
            r"'\[PAD\]' is token 4096, .* only 4096; correct it in tokenizer_config\.json or special_tokens_map\.json",
        ),
    ],
)
def test_a_model_that_lacks_its_end_of_sequence_token_is_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_engine(settings(tmp_path / "m", **files))


def test_the_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"tokenizer\.json: 4097 tokens, more than the model's 4096: use the model's own"
    ):
        load_engine(settings(tmp_path / "m", in_vocabulary=True))
