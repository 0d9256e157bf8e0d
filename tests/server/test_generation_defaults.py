"""Requests that leave options unset, on a server started with `--generation-config model`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import demo_settings

from mpt_grpc.checkpoint import DEMO
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb


def generate_request(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="Once upon a time",
        sampling=pb.SamplingParameters(seed=3, **sampling),
        stopping=pb.StoppingCriteria(ignore_eos=True),
    )


async def test_unset_options_take_the_checkpoints_values_and_set_ones_do_not(make_service: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 12, "top_k": 5}))
    settings = demo_settings()
    model = replace(settings.model, model=str(folder), generation_config="model")
    service = await make_service(replace(settings, model=model))

    defaults = (await service.stub.GetModelInfo(pb.GetModelInfoRequest())).defaults
    assert (defaults.temperature, defaults.max_new_tokens, defaults.top_k, defaults.top_p) == (0, 12, 5, 1)
    unset = (await service.stub.Generate(generate_request())).outputs[0]
    greedy = (await service.stub.Generate(generate_request(temperature=0))).outputs[0]
    assert (unset.num_tokens, unset.text) == (12, greedy.text)
    sampled = (await service.stub.Generate(generate_request(temperature=1, top_k=0))).outputs[0]
    assert sampled.text != greedy.text


async def test_a_top_k_above_the_vocabulary_keeps_all_tokens(make_service: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "demo")
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1_000_000}))
    settings = demo_settings()
    model = replace(settings.model, model=str(folder), generation_config="model")
    service = await make_service(replace(settings, model=model))
    info = await service.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert info.defaults.top_k == info.vocab_size
    await service.stub.Generate(generate_request())


async def test_the_documented_defaults_apply_without_the_option(service: Any) -> None:
    defaults = (await service.stub.GetModelInfo(pb.GetModelInfoRequest())).defaults
    assert defaults == pb.GenerationDefaults(
        temperature=1, top_p=1, typical_p=1, repetition_penalty=1, max_new_tokens=256
    )
