"""The documented command of buf asks the plugins of Go for the documented package. Go itself is not needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = f"""#!{sys.executable}
import sys
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse

request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
response = CodeGeneratorResponse(supported_features=CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
for file in request.proto_file:
    if file.name in request.file_to_generate:
        name = file.name.replace(".proto", sys.argv[0][-5:].replace("-", ".") + ".go")
        response.file.add(name=name, content=f"{{file.options.go_package}} {{request.parameter}}")
sys.stdout.buffer.write(response.SerializeToString())
"""


def test_bufs_command_generates_the_documented_package(tmp_path: Path) -> None:
    page = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^buf generate .*?\]\}'$", page, re.MULTILINE | re.DOTALL)
    (package,) = re.findall(r"of the package `([^`]+)`", page)
    (tmp_path / "bin").mkdir()
    for name in ("protoc-gen-go", "protoc-gen-go-grpc"):
        (tmp_path / "bin" / name).write_text(PLUGIN, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/protos").symlink_to(ROOT / "protos")
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path / "clone", env={**os.environ, "PATH": path})
    generated = sorted((tmp_path / "app/gen/mpt/v1").iterdir())
    assert len(generated) == 2
    assert {file.read_text(encoding="utf-8") for file in generated} == {f"{package};mptv1 paths=source_relative"}
