"""The fingerprint of a server: what its tokens depend on besides the request.

Where it is the same, an output that one server began continues on another with the same tokens. Of large weight files
it covers the size, both ends and a sample of the bytes between them, since reading 13 GB again would double the time of
the start: weights that differ in a few places only may have the same fingerprint. All other files are covered whole.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from hashlib import blake2b
from importlib import import_module
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch

from mpt_grpc.engine.memory import dtype_name
from mpt_grpc.model import linear
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.weights import weight_files
from mpt_grpc.model_files import BYTE_LEVEL_FILES
from mpt_grpc.request import GenerationDefaults
from mpt_grpc.settings import ModelSettings

SAMPLER_VERSION = 2
"""Raised with every change of the code that may change a token."""
_WHOLE_BYTES = 64 << 20
"""Files up to this size are covered whole."""
_NUM_SAMPLES, _SAMPLE_BYTES = 1024, 4096
_MODEL_CODE = Path(linear.__file__).parent
_CONFIGURATIONS = ("config.json", "adapter_config.json")
_LIBRARIES = ("jinja2", "llguidance", "regex", "tokenizers")
"""The libraries that tokenize prompts, decide which tokens a constraint allows, and match the words of guards."""
_TEXTS = ("*token*.json", "*.model", *BYTE_LEVEL_FILES, "*.jinja", "additional_chat_templates/*.jinja")


def fingerprint(
    settings: ModelSettings,
    folder: Path,
    weight_format: WeightFormat,
    cache_dtype: torch.dtype,
    *,
    attention: str,
    defaults: GenerationDefaults,
    max_context_tokens: int,
    eos_token_ids: Collection[int],
    chat_template: str,
    guards: Sequence[str],
) -> str:
    """Returns the fingerprint as the proto describes it: `name:value` pairs, separated by spaces.

    folder: the checkpoint's.
    attention: the name of the backend, which is that of its library on a GPU.
    eos_token_ids: the tokens at which outputs end, from whichever file has them.
    chat_template: the name of the template in use.
    guards: as they were given. Of an argument that is a file, its content counts.
    """
    weights = [] if settings.load_format == "random" else weight_files(folder)
    for adapter in settings.adapters:
        weights += sorted(adapter.glob("adapter_model.*"))
    configurations = [one / name for one in (folder, *settings.adapters) for name in _CONFIGURATIONS]
    texts = sorted({path for pattern in _TEXTS for path in folder.glob(pattern)})
    given = [chat_template, settings.chat_template, *chain.from_iterable(guard.partition("=") for guard in guards)]
    ends = repr(sorted(eos_token_ids)).encode()
    libraries = [f"{name} {version(name)}".encode() for name in _LIBRARIES]
    parts = {
        "model": _digest(_contents([*configurations, *weights])),
        "text": _digest(chain(_contents(texts), [ends], libraries, *(_content_or_text(text) for text in given))),
        "defaults": _digest([repr((defaults, max_context_tokens)).encode()]),
        "precision": f"{dtype_name(weight_format.stored_dtype)}/{dtype_name(cache_dtype)}",
        "numerics": _numerics(weight_format, attention),
        "sampler": str(SAMPLER_VERSION),
    }
    return " ".join(f"{name}:{value}" for name, value in parts.items())


def differences(own: str, other: str) -> list[str]:
    """Returns the names of the parts of one's own fingerprint that another does not have."""
    others = set(other.split())
    return [part.partition(":")[0] for part in own.split() if part not in others]


def _numerics(weight_format: WeightFormat, attention: str) -> str:
    """Returns the name of what computes, and a digest of the code that it runs."""
    code = [torch.__version__.encode()]
    if weight_format.device.type == "cuda":
        name = "cuda"
        code += [torch.cuda.get_device_name(weight_format.device).encode(), str(torch.version.cuda).encode()]
        # The module's own version: its distribution has another name in some builds of PyTorch.
        code.append(f"{attention} {import_module(attention).__version__}".encode())
        code += [path.read_bytes() for path in sorted(_MODEL_CODE.rglob("triton_*.py"))]
        if weight_format.batch_invariant:
            name = "cuda-batch-invariant"
    elif weight_format.kernels is not None:
        name = weight_format.kernels.instruction_set
        # Compilers differ in how they round: the file counts, not the version of its source.
        code += [torch.backends.cpu.get_cpu_capability().encode(), weight_format.kernels.library.read_bytes()]
    else:
        name = "torch"
        # Its libraries choose their code by the model of the CPU.
        code += [torch.backends.cpu.get_cpu_capability().encode(), _cpu_name().encode()]
    return f"{name}-{_digest(code)}"


def _cpu_name() -> str:
    """Returns the model of the CPU as the operating system reports it; empty where it is not Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def _digest(contents: Iterable[bytes]) -> str:
    digest = blake2b(digest_size=8)
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _content_or_text(text: str) -> Iterator[bytes]:
    return _contents([Path(text)]) if os.path.isfile(text) else iter([text.encode(errors="replace")])


def _contents(files: Iterable[Path]) -> Iterator[bytes]:
    """Yields the content of the files that exist, or samples of it."""
    for path in files:
        if not path.is_file():
            continue
        size = path.stat().st_size
        if size <= _WHOLE_BYTES:
            yield path.read_bytes()
            continue
        yield size.to_bytes(8, "little")
        with path.open("rb", buffering=0) as opened:
            for number in range(_NUM_SAMPLES):
                opened.seek((size - _SAMPLE_BYTES) * number // (_NUM_SAMPLES - 1))
                yield opened.read(_SAMPLE_BYTES)
