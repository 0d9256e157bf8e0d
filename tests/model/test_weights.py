"""Checkpoints in every published layout load to the same model; errors name the tensor or file; no code is executed."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from model.conftest import (
    CPU,
    Format,
    load,
    make_checkpoint,
    random_tokens,
    random_weights,
    run_prompt,
    tiny_config,
)
from torch import Tensor
from transformers import MptConfig, MptForCausalLM

from mpt_grpc.errors import ModelError, WeightsError
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.tensor_files import read_tensors
from mpt_grpc.model.weights import num_parameters, random_model, weight_files

CONFIG = tiny_config()
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
COMPARE = "check that config.json is that of these weights"
FORMATS = pytest.mark.parametrize("format", ["safetensors", "bin"])


def edited(**changes: Tensor | None) -> dict[str, Tensor]:
    """Returns the random weights with tensors replaced, added or (if None) removed; `__` in a name stands for a dot."""
    weights: dict[str, Any] = random_weights(CONFIG)
    weights |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in weights.items() if tensor is not None}


@pytest.fixture(autouse=True)
def _plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the weights as they are loaded: the kernels would pack them."""
    monkeypatch.setenv("MPT_GRPC_ISA", "none")


@FORMATS
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_loads_the_same_tensors(tmp_path: Path, format: Format, shards: int) -> None:  # noqa: A002
    config = tiny_config(
        {"qk_ln": True, "alibi": False}, no_bias=False, tie_word_embeddings=False, ffn_config={"ffn_type": "mptglu"}
    )
    written = make_checkpoint(tmp_path, config, shards=shards, format=format)
    assert len(weight_files(tmp_path)) == shards
    loaded = load(tmp_path).state_dict()
    assert loaded.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(loaded[name], tensor), name
    assert num_parameters(MPTConfig.from_dict(config)) == sum(tensor.numel() for tensor in written.values())


@FORMATS
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_are_converted_from_their_stored_dtype(
    tmp_path: Path,
    format: Format,  # noqa: A002
    stored: torch.dtype,
) -> None:
    written = make_checkpoint(
        tmp_path, CONFIG, {name: tensor.to(stored) for name, tensor in random_weights(CONFIG).items()}, format=format
    )
    for name, tensor in load(tmp_path).state_dict().items():
        assert torch.equal(tensor, written[name].float()), name


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_saved_by_transformers_is_loaded(tmp_path: Path, max_shard_size: str, tied: bool) -> None:
    config = MptConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=96, tie_word_embeddings=tied)
    saved = MptForCausalLM(config).eval()
    saved.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    tokens = random_tokens(20)
    with torch.inference_mode():
        expected = saved(torch.tensor([tokens])).logits[0, -1:]
    torch.testing.assert_close(run_prompt(load(tmp_path), tokens, [20]), expected, rtol=0, atol=1e-4)


@FORMATS
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        pytest.param(
            edited(transformer__blocks__1__norm_2__weight=None),
            "tensor 'transformer.blocks.1.norm_2.weight' is missing; 1 missing in total; " + COMPARE,
            id="missing",
        ),
        pytest.param(
            edited(transformer__blocks__2__norm_1__weight=torch.ones(64)),
            "tensor 'transformer.blocks.2.norm_1.weight' is not part of this model; " + COMPARE,
            id="extra",
        ),
        pytest.param(
            edited(transformer__norm_f__bias=torch.zeros(64)),
            "tensor 'transformer.norm_f.bias' is not part of this model; config.json sets no_bias to true, which is"
            " also the default",
            id="bias",
        ),
        pytest.param(
            edited(transformer__blocks__0__attn__Wqkv__weight=torch.zeros(64, 192)),
            "tensor 'transformer.blocks.0.attn.Wqkv.weight' has shape [64, 192], not [192, 64]; " + COMPARE,
            id="misshapen",
        ),
        pytest.param(
            edited(transformer__blocks__0__attn__Wqkv__weight=torch.zeros(0)),
            "tensor 'transformer.blocks.0.attn.Wqkv.weight' has shape [0], not [192, 64]; it is empty; gather the"
            " parameters before saving, as zero_to_fp32.py does",
            id="empty",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_the_error(
    tmp_path: Path,
    format: Format,  # noqa: A002
    weights: dict[str, Tensor],
    message: str,
) -> None:
    make_checkpoint(tmp_path, CONFIG, weights, format=format)
    with pytest.raises(WeightsError) as error:
        load(tmp_path)
    assert str(error.value) == message


@FORMATS
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_stored_head_is_accepted_only_if_it_equals_the_embedding(
    tmp_path: Path,
    format: Format,  # noqa: A002
    head_first: bool,
    shards: int,
) -> None:
    weights = random_weights(CONFIG)
    head = {HEAD: weights[EMBEDDING].clone()}
    make_checkpoint(tmp_path, CONFIG, head | weights if head_first else weights | head, shards=shards, format=format)
    assert HEAD not in load(tmp_path).state_dict()
    head[HEAD][95, 63] += 0.5
    make_checkpoint(tmp_path, CONFIG, head | weights if head_first else weights | head, shards=shards, format=format)
    with pytest.raises(WeightsError, match=r"'lm_head.weight' differs .* sets tie_word_embeddings to true"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"epoch": 3, "state_dict": random_weights(CONFIG)}, "['state_dict']"),
        ({"module": random_weights(CONFIG), "step": 3}, "['module']"),
        (
            {"state": {"timestamp": {}, "model": random_weights(CONFIG), "optimizers": {}}, "rng": []},
            "['state']['model']",
        ),
    ],
)
def test_weights_inside_of_a_mapping_are_refused_with_their_place(
    tmp_path: Path, state: dict[str, Any], place: str
) -> None:
    make_checkpoint(tmp_path, CONFIG, format="bin")
    torch.save(state, tmp_path / "pytorch_model.bin")
    message = re.escape(f"pytorch_model.bin: expected a mapping of names to dense tensors; save its {place} alone")
    with pytest.raises(WeightsError, match=message):
        load(tmp_path)


def test_parameters_are_loaded_like_other_tensors(tmp_path: Path) -> None:
    written = make_checkpoint(tmp_path, CONFIG, format="bin")
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in written.items()}, tmp_path / "pytorch_model.bin")
    assert not any(tensor.requires_grad for _, tensor in read_tensors(weight_files(tmp_path)))
    assert torch.equal(load(tmp_path).state_dict()[EMBEDDING], written[EMBEDDING])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("ggml-model-q4_0.gguf", ": llama.cpp's format is not read: use the checkpoint from which it was made"),
        ("mpt-7b.ggmlv3.q4_0.bin", ": llama.cpp's format is not read: use the checkpoint from which it was made"),
        ("onnx/decoder_model.onnx", ": ONNX is not read: use the checkpoint from which it was made"),
        ("openvino_model.bin", ": OpenVINO's format is not read: use the checkpoint from which it was made"),
        ("gptq_model-4bit-128g.safetensors", ": a quantized model is not read: use the checkpoint from which it was"),
        ("model-00001-of-00001.safetensors", ": the index of these shards is missing: download it, too"),
        ("ep1-ba1-rank0.pt", ": a training checkpoint is not read: convert it, that of llm-foundry with its convert_"),
        ("last.ckpt", ": a training checkpoint is not read"),
        ("model.fp16.safetensors", ""),
    ],
)
def test_other_files_with_weights_are_named_where_none_can_be_read(tmp_path: Path, name: str, remedy: str) -> None:
    make_checkpoint(tmp_path, CONFIG)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    end = "" if remedy else "$"
    with pytest.raises(
        WeightsError, match=rf"no weights found; expected one of .*; found {re.escape(name + remedy)}{end}"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_link_to_nothing_is_no_missing_file(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, CONFIG, shards=1 if name == "model.safetensors" else 2)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("../../blobs/0")
    with pytest.raises(
        ModelError, match=rf"{name}: a symbolic link to \.\./\.\./blobs/0, which does not exist; download"
    ):
        load(tmp_path)


def test_constants_of_rotary_embeddings_are_computed_and_not_read(tmp_path: Path) -> None:
    config = tiny_config({"rope": True})
    stored = {"transformer.rotary_embedding.inv_freq": torch.zeros(8)}
    make_checkpoint(tmp_path / "with", config, random_weights(config) | stored)
    make_checkpoint(tmp_path / "without", config)
    tokens = random_tokens(20)
    expected = run_prompt(load(tmp_path / "without"), tokens, [20])
    assert torch.equal(run_prompt(load(tmp_path / "with"), tokens, [20]), expected)


class Touch:
    """Creates a file when it is unpickled, as malicious code in a pickle could."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_code_in_a_pickle_is_rejected_and_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    make_checkpoint(tmp_path, CONFIG, {**random_weights(CONFIG), "extra": Touch(trace)}, format="bin")  # type: ignore[dict-item]
    with pytest.raises(WeightsError, match=r"cannot read .*pytorch_model\.bin: it contains [\w.]+, which is not read"):
        load(tmp_path)
    assert not trace.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert trace.exists(), "without weights_only the code is executed"


@pytest.mark.parametrize(
    "state",
    [
        [torch.ones(2)],
        {"epoch": 3},
        torch.ones(2),
        {"a": torch.ones(2).to_sparse()},
        {1: torch.ones(2)},
        {"a": torch.ones(2, device="meta")},
    ],
)
def test_a_pickle_that_is_not_a_mapping_to_tensors_is_rejected(tmp_path: Path, state: object) -> None:
    make_checkpoint(tmp_path, CONFIG, format="bin")
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: expected a mapping of names to dense tensors"):
        load(tmp_path)


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_the_protocol_of_a_pickle_that_is_too_new_is_told(
    tmp_path: Path, protocol: int, is_zip: bool, recwarn: pytest.WarningsRecorder
) -> None:
    written = make_checkpoint(tmp_path, CONFIG, format="bin")
    file = tmp_path / "pytorch_model.bin"
    torch.save(written, file, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(
        WeightsError, match=r"pytorch_model\.bin: its pickle has protocol 4 or later; torch.save writes 2"
    ):
        load(tmp_path)
    assert not recwarn.list


def test_a_zip_file_of_something_else_is_rejected_without_the_place_in_torchs_code(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CONFIG, format="bin")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("notes.txt", "weights")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: file in archive is not .*; download or save it again"):
        load(tmp_path)


@FORMATS
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_rejected_by_name(tmp_path: Path, format: Format, share: float) -> None:  # noqa: A002
    make_checkpoint(tmp_path, CONFIG, format=format)
    (file,) = weight_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(WeightsError, match=file.name):
        load(tmp_path)


@FORMATS
@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"\x80" * 999])
def test_a_file_in_another_format_is_rejected_by_name(tmp_path: Path, format: Format, content: bytes) -> None:  # noqa: A002
    make_checkpoint(tmp_path, CONFIG, format=format)
    (file,) = weight_files(tmp_path)
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=file.name) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    assert ("git lfs pull" in str(error.value)) == content.startswith(b"version")


def test_a_file_of_an_old_version_of_pytorch_is_loaded(tmp_path: Path) -> None:
    written = make_checkpoint(tmp_path, CONFIG, format="bin")
    torch.save(written, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(load(tmp_path).state_dict()[EMBEDDING], written[EMBEDDING])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("reason", ["No such file or directory", "Is a directory", "Too many levels of symbolic links"])
def test_the_reason_why_a_file_cannot_be_opened_is_given(tmp_path: Path, name: str, reason: str) -> None:
    file = tmp_path / name
    if reason == "Is a directory":
        file.mkdir()
    elif reason == "Too many levels of symbolic links":
        file.symlink_to(file)
    with pytest.raises(WeightsError, match=rf"^cannot read .*{re.escape(name)}: {reason}$"):
        list(read_tensors([file]))


def test_a_lack_of_memory_is_not_taken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    make_checkpoint(tmp_path, CONFIG, format="bin")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(MemoryError):
        load(tmp_path)


@FORMATS
def test_an_index_may_name_shards_relative_to_its_folder(tmp_path: Path, format: Format) -> None:  # noqa: A002
    make_checkpoint(tmp_path, CONFIG, shards=2, format=format)
    (index,) = tmp_path.glob("*.index.json")
    names = {name: f"./{shard}" for name, shard in json.loads(index.read_text())["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": names}))
    assert len(weight_files(tmp_path)) == 2
    load(tmp_path)


@FORMATS
def test_a_missing_shard_is_named_in_the_error(tmp_path: Path, format: Format) -> None:  # noqa: A002
    make_checkpoint(tmp_path, CONFIG, shards=3, format=format)
    lost = weight_files(tmp_path)[1]
    lost.unlink()
    with pytest.raises(WeightsError, match=f"shard '{lost.name}' is not in the folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 1}}']
)
def test_an_invalid_index_is_rejected_by_name(tmp_path: Path, index: str) -> None:
    make_checkpoint(tmp_path, CONFIG, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load(tmp_path)


def test_a_stale_index_beside_a_complete_file_is_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CONFIG)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: "gone.safetensors"}}))
    assert [path.name for path in weight_files(tmp_path)] == ["model.safetensors"]


def test_biases_that_the_config_does_not_announce_are_refused_with_the_field(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_config(no_bias=False))
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "no_bias"}))
    with pytest.raises(WeightsError, match=r"\.bias' is not part of this model; config\.json sets no_bias to true"):
        load(tmp_path)


def test_an_index_cannot_refer_to_files_outside_its_folder(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, CONFIG)
    make_checkpoint(tmp_path / "model", CONFIG, shards=2)
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {EMBEDDING: "../model.safetensors"}}))
    with pytest.raises(WeightsError, match=r"shard '\.\./model\.safetensors' is not in the folder"):
        load(tmp_path / "model")


def test_the_error_for_a_folder_without_weights_lists_the_expected_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(WeightsError, match=r"model\.safetensors, .*pytorch_model\.bin"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_are_deterministic_and_give_finite_distinct_logits(dtype: torch.dtype) -> None:
    config = MPTConfig.from_dict(tiny_config({"qk_ln": True}, n_layers=12, no_bias=False))
    first, second = (
        run_prompt(random_model(config, WeightFormat(dtype, CPU)), random_tokens(40), [30] + [1] * 10) for _ in range(2)
    )
    assert first.isfinite().all()
    assert first.std(dim=-1).min() > 0.01
    assert torch.equal(first, second), "the weights must be the same every time"


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not support bfloat16")
@pytest.mark.parametrize("bias", [True, False])
def test_prepacked_weights_give_bit_identical_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    make_checkpoint(tmp_path, tiny_config(d_model=256, no_bias=not bias))
    tokens, sizes = random_tokens(64), [30, 17, 7] + [1] * 10
    packed = load(tmp_path, torch.bfloat16)
    assert packed.transformer.blocks[0].attn.Wqkv.weight is None
    monkeypatch.setattr("mpt_grpc.model.linear.Linear.prepack", lambda self, weight_format: None)  # noqa: ARG005
    plain = load(tmp_path, torch.bfloat16)
    assert plain.transformer.blocks[0].attn.Wqkv.weight is not None
    assert torch.equal(run_prompt(packed, tokens, sizes), run_prompt(plain, tokens, sizes))
