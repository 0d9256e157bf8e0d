"""Peak memory while loading is about the size of the model, measured as anonymous memory in a separate process.

Pages of the mapped file do not count, since the kernel can drop them when it needs memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_adapters import save_adapter, transformers_model
from model.conftest import Format, make_checkpoint, tiny_config

MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from mpt_grpc.model.adapters import Adapter
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.linear import WeightFormat
from mpt_grpc.model.native import load_kernels
from mpt_grpc.model.weights import load_model, parameter_shapes

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

folder, dtype, cpu = Path(sys.argv[1]), getattr(torch, sys.argv[2]), torch.device("cpu")
config = MPTConfig.from_file(folder / "config.json")
shapes = parameter_shapes(config)  # excludes the 70 MB that torch imports to build a module on the meta device
adapters = [Adapter.from_folder(Path(adapter), shapes) for adapter in sys.argv[3:]]
before, measured, done = anonymous_bytes(), [], threading.Event()

def measure():
    while not done.wait(0.0005):
        measured.append(anonymous_bytes())

thread = threading.Thread(target=measure)
thread.start()
model = load_model(folder, config, WeightFormat(dtype, cpu, load_kernels()), adapters)
done.set()
thread.join()
print(json.dumps({"peak": max(measured) - before, "end": anonymous_bytes() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
@pytest.mark.parametrize(
    ("format", "dtype", "adapted"),
    [("safetensors", "float32", False), ("bin", "bfloat16", False), ("safetensors", "float32", True)],
)
def test_peak_memory_while_loading_is_about_the_size_of_the_model(
    tmp_path: Path,
    format: Format,  # noqa: A002
    dtype: str,
    adapted: bool,
) -> None:
    """The model has 100 MB in 50 tensors of at most 4 MB.

    A loader that reads a whole shard would need 1.5 times the model and one that reads the whole checkpoint 2 times.
    The bound of 1.2 is well below both, and leaves a margin for one more tensor and for the rest of the process. A real
    model's tensors are so large that free() returns them to the system immediately; the environment variable makes
    glibc do so for these as well.
    """
    config = tiny_config(d_model=512, n_layers=8, vocab_size=512)
    weights = make_checkpoint(tmp_path, config, shards=2, format=format)
    model_bytes = sum(tensor.numel() for tensor in weights.values()) * getattr(torch, dtype).itemsize
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    if adapted:
        model = transformers_model(tmp_path)
        command.append(str(save_adapter(tmp_path / "adapter", model, r=1, target_modules="all-linear")))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    measured = json.loads(run.stdout)
    assert measured["end"] > model_bytes * 0.95, "the measurement must include the model"
    assert measured["peak"] < model_bytes * 1.2
