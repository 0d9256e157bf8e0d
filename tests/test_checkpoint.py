"""Locating a model's files: on this machine, in the Hub's cache, and on a Hub, which is a small local one here."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, running_hub
from server_process import running

from mpt_grpc.checkpoint import DEMO, find_checkpoint
from mpt_grpc.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = {
    name: f'{{"of": "{name}"}}'.encode()
    for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "chat_template.jinja", "additional_chat_templates/rag.jinja",
    )
}  # fmt: skip
OTHERS = dict.fromkeys(
    (
        "README.md", "modeling_mpt.py", "vocab.json", "original/config.json", "original/model.safetensors",
        "model.fp16.safetensors", "model-00003-of-00003.safetensors", "tf_model.h5", "pytorch_model.pt",
    ),
    b"never read",
)  # fmt: skip
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor {name}": name for name in names}}).encode()


@pytest.fixture(scope="module")
def one_hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(one_hub: FakeHub) -> FakeHub:
    one_hub.repositories.clear()
    one_hub.downloads.clear()
    one_hub.tokens.clear()
    return one_hub


def hub_environment(home: Path, **variables: str) -> dict[str, str]:
    """The environment with the Hub's variables set to these, and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return inherited | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"} | variables


def find(model: str, home: Path, revision: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Finds a checkpoint in a process, since the Hub's library reads its variables when it is imported."""
    code = (
        f"from mpt_grpc.checkpoint import *; c = find_checkpoint({model!r}, {revision!r}); download_weights(c);"
        " print(c.name, c.folder)"
    )
    environment = hub_environment(home, **variables)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def found(model: str, home: Path, revision: str | None = None, **variables: str) -> Path:
    """Returns the folder found, and checks that nothing was logged."""
    process = find(model, home, revision, **variables)
    assert (process.returncode, process.stderr) == (0, "")
    name, _, folder = process.stdout.strip().partition(" ")
    assert name == model
    return Path(folder)


def error_of(model: str, home: Path, revision: str | None = None, **variables: str) -> str:
    """Returns the last line of standard error, which is the message of a ModelError."""
    process = find(model, home, revision, **variables)
    assert process.returncode == 1
    error, _, message = process.stderr.splitlines()[-1].partition(": ")
    assert error in ("mpt_grpc.errors.ModelError", "mpt_grpc.errors.WeightsError"), process.stderr
    return message


def test_finds_the_demo_model_and_folders(tmp_path: Path) -> None:
    demo = find_checkpoint("demo")
    assert (demo.name, (demo.folder / "model.safetensors").is_file()) == ("demo", True)
    with pytest.raises(ModelError, match=r"--model: empty; expected demo, a folder, or a Hub ID"):
        find_checkpoint("")
    (tmp_path / "my-mpt").mkdir()
    (tmp_path / "my-mpt" / "config.json").touch()
    with pytest.raises(ModelError, match=r"no config\.json; found my-mpt/config\.json: use the folder that contains"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "my-mpt" / "config.json").unlink()
    (tmp_path / "my-mpt" / "mpt-7b.Q4_0.gguf").touch()
    with pytest.raises(
        ModelError, match=r"the weights; found mpt-7b\.Q4_0\.gguf: llama\.cpp's format is not read: use"
    ):
        find_checkpoint(f"{tmp_path}/my-mpt")
    (tmp_path / "my-mpt" / "mpt-7b.Q4_0.gguf").unlink()
    (tmp_path / "my-mpt" / "mpt.nemo").mkdir()
    with pytest.raises(ModelError, match=r"--model .*my-mpt: no config\.json; a model needs it, .* the weights$"):
        find_checkpoint(f"{tmp_path}/my-mpt")
    (tmp_path / "my-mpt" / "adapter_config.json").touch()
    with pytest.raises(ModelError, match=r"no config\.json; it is an adapter: use --adapter .*my-mpt, with its model"):
        find_checkpoint(f"{tmp_path}/my-mpt")
    with pytest.raises(ModelError, match=r"not a folder; use the folder that contains config\.json"):
        find_checkpoint(f"{tmp_path}/my-mpt/adapter_config.json")
    (tmp_path / "models--owner--name" / "snapshots").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"it is a folder of the Hub's cache: use the model's ID, or one of the fold"):
        find_checkpoint(f"{tmp_path}/models--owner--name")
    (tmp_path / "my-mpt" / "config.json").symlink_to("../../blobs/0")
    with pytest.raises(ModelError, match=r"config\.json: a symbolic link to \.\./\.\./blobs/0, which does not exist"):
        find_checkpoint(f"{tmp_path}/my-mpt")
    (tmp_path / "my-mpt" / "config.json").unlink()
    (tmp_path / "my-mpt" / "config.json").touch()
    assert find_checkpoint(f"{tmp_path}/my-mpt/").name == "my-mpt"


def test_a_large_folder_is_not_searched_in_full(tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mpt.gguf").touch()
    with pytest.raises(ModelError, match=r"no config\.json; a model needs it, .* the weights$"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "why"),
    [("n" * 5000, "File name too long"), ("~nobody-of-this-name/m", "Could not determine home directory")],
)
def test_a_name_that_the_system_refuses_is_refused(model: str, why: str) -> None:
    with pytest.raises(ModelError, match=f"^--model {model}: {why}"):
        find_checkpoint(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ModelError, match=r"closed: Permission denied$"):
        find_checkpoint(str(tmp_path / "closed"))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_rejects_names_that_are_neither_folders_nor_hub_ids(model: str) -> None:
    with pytest.raises(ModelError, match=rf"--model {model}: no such folder, and not a Hub ID"):
        find_checkpoint(model)


@pytest.mark.parametrize("model", ["demo", "."])
def test_a_revision_of_anything_but_a_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ModelError, match=rf"--revision v1: --model {model} is .*; only models of the Hub have"):
        find_checkpoint(model, "v1")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_finds_a_hub_id_in_the_local_hub_cache(tmp_path: Path, weights: str) -> None:
    snapshot = tmp_path / "models--mosaicml--mpt-7b" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", weights):
        (snapshot / name).write_text("{}")
    (tmp_path / "models--mosaicml--mpt-7b" / "refs").mkdir()
    (tmp_path / "models--mosaicml--mpt-7b" / "refs" / "main").write_text(COMMIT)
    assert found("mosaicml/mpt-7b", tmp_path, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path)) == snapshot


@pytest.mark.parametrize(
    ("weights", "read"),
    [
        (("model.safetensors", "pytorch_model.bin"), ("model.safetensors",)),
        (("model.safetensors.index.json", *SHARDS), ("model.safetensors.index.json", *SHARDS)),
        (("pytorch_model.bin",), ("pytorch_model.bin",)),
        (("pytorch_model.bin.index.json", "a.bin", "b.bin"), ("pytorch_model.bin.index.json", "a.bin", "b.bin")),
    ],
)
def test_downloads_what_the_loader_reads_and_nothing_else(
    hub: FakeHub, tmp_path: Path, weights: tuple[str, ...], read: tuple[str, ...]
) -> None:
    shards = index(*weights[1:])
    files = {name: shards if name.endswith("index.json") else name.encode() for name in weights}
    files = TEXTS | OTHERS | files | {"tokenizer.model": b"replaced by tokenizer.json"}
    commit = hub.add("owner/name", files)
    folder = found("owner/name", tmp_path, HF_ENDPOINT=hub.url)
    assert folder.name == commit
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        n: files[n] for n in (*TEXTS, *read)
    }
    assert sorted(hub.downloads) == sorted((*TEXTS, *read))
    assert found("owner/name", tmp_path, HF_ENDPOINT=hub.url) == folder
    assert found("owner/name", tmp_path, HF_HUB_OFFLINE="1") == folder
    assert len(hub.downloads) == len(TEXTS) + len(read)  # the cache is used, online and offline


@pytest.mark.parametrize("names", [["spiece.model"], ["vocab.json", "merges.txt"]])
def test_other_tokenizers_are_downloaded_where_there_is_no_tokenizer_json(
    hub: FakeHub, tmp_path: Path, names: list[str]
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"tensors", **dict.fromkeys(names, b"pieces")}
    hub.add("owner/name", files)
    folder = found("owner/name", tmp_path, HF_ENDPOINT=hub.url)
    assert {path.name for path in folder.iterdir()} == files.keys()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: FakeHub, tmp_path: Path) -> None:
    old = hub.add("owner/name", TEXTS | {"model.safetensors": b"old"})
    new = hub.add("owner/name", TEXTS | {"model.safetensors": b"new"})
    hub.repositories["owner/name"].refs |= {"v1.0": old, "refs/pr/1": old}
    for revision, commit in ((None, new), ("main", new), ("v1.0", old), ("refs/pr/1", old), (old, old)):
        for variables in ({"HF_ENDPOINT": hub.url}, {"HF_HUB_OFFLINE": "1"}):
            folder = found("owner/name", tmp_path, revision, **variables)
            assert (folder.name, (folder / "model.safetensors").read_bytes()) == (
                commit,
                b"old" if commit == old else b"new",
            )


def test_all_files_are_of_one_commit_though_the_branch_moves_meanwhile(hub: FakeHub, tmp_path: Path) -> None:
    old = hub.add("owner/name", TEXTS | {"model.safetensors": b"old"})
    hub.moves_after_listing["owner/name"] = TEXTS | {"model.safetensors": b"new"}
    folder = found("owner/name", tmp_path, HF_ENDPOINT=hub.url)
    assert hub.repositories["owner/name"].refs["main"] != old
    assert (folder.name, (folder / "model.safetensors").read_bytes()) == (old, b"old")


def test_the_token_opens_private_and_gated_models(hub: FakeHub, tmp_path: Path) -> None:
    for access in ("private", "gated"):
        hub.add(f"owner/{access}", TEXTS | {"model.safetensors": b"x"}, access)
        assert found(f"owner/{access}", tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert hub.tokens == {TOKEN}


UNAVAILABLE = {
    "missing": ("owner/nothing", None, {}, "--model owner/nothing: no such folder, and no such model on the Hub; "),
    "private": ("owner/private", None, {}, "--model owner/private: no such folder, and .*if it is private, set HF_TOK"),
    "gated": ("owner/gated", None, {}, "--model owner/gated: its owner restricts access; request it .*, and set HF_TO"),
    "bad token": ("owner/public", None, {"HF_TOKEN": "hf_x"}, "--model owner/public: the Hub refuses access; check HF"),
    "no such revision": ("owner/public", "v9", {}, "--revision v9: owner/public has no such branch, tag or commit$"),
    "no such commit": ("owner/public", COMMIT, {}, f"--revision {COMMIT}: owner/public has no such branch, tag or"),
    "offline": (
        "owner/public",
        "v1",
        {"HF_HUB_OFFLINE": "1"},
        "--model owner/public --revision v1: no such folder, and not complete.* HF_HUB",
    ),
    "no Hub": (
        "owner/public",
        None,
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "--model owner/public: no such folder, and not av",
    ),
    "no such name": ("owner/--", None, {}, "--model owner/--: no such folder, and not .*: Repo id must"),
    "not a model": ("owner/empty", None, {}, "--model owner/empty: no config.json; a model needs it"),
    "an adapter": ("owner/adapter", None, {}, "--model owner/adapter: no config.json; it is an adapter: use"),
    "GGUF": (
        "owner/gguf",
        None,
        {},
        "--model owner/gguf: no config.json; .*; found q4.gguf: llama.cpp's format is not",
    ),
    "GGML": (
        "owner/ggml",
        None,
        {},
        "--model owner/ggml: no weights found; .*; found mpt.ggml.q4.bin: llama.cpp's form",
    ),
    "ONNX": (
        "owner/onnx",
        None,
        {},
        "--model owner/onnx: no weights found; .*; found onnx/model.onnx: ONNX is not read",
    ),
    "no weights": ("owner/public", None, {}, "--model owner/public: no weights found; expected one of model.safetens"),
    "a broken index": ("owner/broken", None, {}, ".*model.safetensors.index.json: not a shard index"),
}


@pytest.mark.parametrize("case", UNAVAILABLE)
def test_what_is_not_available_is_refused_in_one_line_with_the_flag_to_change(
    hub: FakeHub, tmp_path: Path, case: str
) -> None:
    hub.add("owner/public", TEXTS)
    hub.add("owner/private", TEXTS, "private")
    hub.add("owner/gated", TEXTS, "gated")
    hub.add("owner/empty", {"README.md": b"nothing else"})
    hub.add("owner/gguf", {"q4.gguf": b"GGUF"})
    hub.add("owner/ggml", {"config.json": b'{"model_type": "mpt"}', "mpt.ggml.q4.bin": b"ggjt"})
    hub.add("owner/onnx", TEXTS | {"onnx/model.onnx": b"graph"})
    hub.add("owner/adapter", {"adapter_config.json": b"{}"})
    hub.add("owner/broken", TEXTS | {"model.safetensors.index.json": b"{}"})
    model, revision, variables, message = UNAVAILABLE[case]
    assert re.match(message, error_of(model, tmp_path, revision, **{"HF_ENDPOINT": hub.url} | variables))


@pytest.mark.parametrize("files", [{}, {"config.json": b'{"model_type": "llama"}'}, {"tokenizer.json": b"{}"}])
def test_the_weights_of_a_model_that_is_refused_are_not_downloaded(
    hub: FakeHub, tmp_path: Path, files: dict[str, bytes]
) -> None:
    model = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    hub.add("owner/name", {**model, **files} if files else {"model.safetensors": b"without a configuration"})
    code = (
        "from mpt_grpc.engine.load import *; from mpt_grpc.settings import ModelSettings;"
        " load_engine(Settings(model=ModelSettings('owner/name')))"
    )
    environment = hub_environment(tmp_path, HF_ENDPOINT=hub.url)
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert re.match(r"mpt_grpc\.errors\.(Model|Config)Error: ", process.stderr.splitlines()[-1])
    assert "model.safetensors" not in hub.downloads


def test_progress_is_shown_on_a_terminal(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("owner/name", TEXTS | {"model.safetensors": b"x" * 100_000})
    terminal, stderr = pty.openpty()
    code = "from mpt_grpc.checkpoint import *; download_weights(find_checkpoint('owner/name'))"
    environment = hub_environment(tmp_path, HF_ENDPOINT=hub.url)
    termios.tcsetwinsize(terminal, (24, 80))
    shown = b""
    with open(terminal, "rb", buffering=0) as screen:
        with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=stderr):
            os.close(stderr)
            with suppress(OSError):  # Linux's end of file of a terminal
                while piece := screen.read(4096):
                    shown += piece
    assert b"100%" in shown


def test_a_server_serves_the_revision(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/name", {path.name: path.read_bytes() for path in DEMO.iterdir()})
    hub.repositories["owner/name"].refs = {"v1": hub.repositories["owner/name"].refs["main"]}
    for name, value in hub_environment(tmp_path, HF_ENDPOINT=hub.url).items():
        monkeypatch.setenv(name, value)
    with running("--model", "owner/name", "--revision", "v1") as server:
        assert "serving owner/name: " in server.welcome[0]
    assert server.stderr == ""
