"""Loading needs the model once: measured in a process of its own, as anonymous memory.

Pages of the mapped file do not count: the kernel drops them when it needs the room.
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
num_parameters(config)  # what torch imports to build a module on the meta device, 70 MB, is not the loader's
before, seen, ended = anonymous_bytes(), [], threading.Event()

def watch():
    while not ended.wait(0.0005):
        seen.append(anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(folder, config, dtype, cpu)
ended.set()
watcher.join()
print(json.dumps({"peak": max(seen) - before, "end": anonymous_bytes() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says how much memory is anonymous")
@pytest.mark.parametrize(("format", "dtype"), [("safetensors", "float32"), ("bin", "bfloat16")])
def test_loading_takes_the_memory_of_the_model_once(tmp_path: Path, format: Format, dtype: str) -> None:  # noqa: A002
    """The model has 100 MB in 50 tensors of at most 4 MB.

    The bound of 1.2 models is far from the 1.5 of a loader that reads a whole shard and the 2 of one that reads the
    whole checkpoint, and leaves room for one tensor more and for what else the process does. A real model's tensors
    are so large that free() gives them back at once; the environment has glibc do so with these.
    """
    config = tiny_config(d_model=512, n_layers=8, vocab_size=512)
    weights = make_checkpoint(tmp_path, config, shards=2, format=format)
    model_bytes = sum(tensor.numel() for tensor in weights.values()) * getattr(torch, dtype).itemsize
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    measured = json.loads(run.stdout)
    assert measured["end"] > model_bytes * 0.95, "the model is in memory, and was measured"
    assert measured["peak"] < model_bytes * 1.2
