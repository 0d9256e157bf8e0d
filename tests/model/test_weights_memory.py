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
from model.conftest import Format, make_checkpoint, tiny_config

MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from mpt_grpc.model.config import MPTConfig
from mpt_grpc.model.weights import load_model, num_parameters

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

folder, dtype, cpu = Path(sys.argv[1]), getattr(torch, sys.argv[2]), torch.device("cpu")
config = MPTConfig.from_file(folder / "config.json")
num_parameters(config)  # excludes the 70 MB that torch imports to build a module on the meta device
before, measured, done = anonymous_bytes(), [], threading.Event()

def measure():
    while not done.wait(0.0005):
        measured.append(anonymous_bytes())

thread = threading.Thread(target=measure)
thread.start()
model = load_model(folder, config, dtype, cpu)
done.set()
thread.join()
print(json.dumps({"peak": max(measured) - before, "end": anonymous_bytes() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
@pytest.mark.parametrize(("format", "dtype"), [("safetensors", "float32"), ("bin", "bfloat16")])
def test_peak_memory_while_loading_is_about_the_size_of_the_model(tmp_path: Path, format: Format, dtype: str) -> None:  # noqa: A002
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
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    measured = json.loads(run.stdout)
    assert measured["end"] > model_bytes * 0.95, "the measurement must include the model"
    assert measured["peak"] < model_bytes * 1.2
