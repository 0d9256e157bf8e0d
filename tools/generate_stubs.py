"""Generates the Python stubs in clients/python/mpt_grpc_client/proto from protos/.

Messages and services come from different releases of protoc, chosen so that the stubs run on every supported version:
generated messages need a protobuf runtime of the same or the next major version that is not older than they are, and
generated services need a grpcio that is not older than they are.

Usage: python tools/generate_stubs.py BIN_OF_MESSAGES_ENVIRONMENT BIN_OF_SERVICES_ENVIRONMENT
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROTOS = ROOT / "protos"
STUBS = ROOT / "clients" / "python" / "mpt_grpc_client" / "proto"
# protoc names Python modules after the proto files; the stubs live in the client's package instead, so that the client
# does not claim the top-level name `mpt`. The proto files keep their canonical names in the descriptor pool.
_IMPORT = re.compile(r"^((?:from|import) )mpt\.(?=v\d)", flags=re.MULTILINE)


def main(messages_bin: str, services_bin: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _protoc(messages_bin, f"--python_out={folder}", f"--mypy_out=quiet:{folder}", f"--mypy_grpc_out=quiet:{folder}")
        _protoc(services_bin, f"--grpc_python_out={folder}")
        for generated in sorted(Path(folder, "mpt").rglob("*_pb2*")):
            text = _IMPORT.sub(r"\1mpt_grpc_client.proto.", generated.read_text(encoding="utf-8"))
            stub = STUBS / generated.relative_to(Path(folder, "mpt"))
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(text, encoding="utf-8")


def _protoc(environment_bin: str, *outputs: str) -> None:
    protos = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    search_path = os.pathsep.join((str(Path(environment_bin).resolve()), os.environ["PATH"]))
    python = shutil.which("python", path=search_path)
    assert python is not None
    subprocess.run(
        [python, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *outputs, *protos],
        check=True,
        env={**os.environ, "PATH": search_path},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
