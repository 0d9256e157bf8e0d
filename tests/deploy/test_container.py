"""The image that deploy/Dockerfile describes, as far as that shows without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from programs import DEPLOY, output_of, program, program_or_skip
from server_process import CLI, running

from mpt_grpc.cli import _parser

ROOT = DEPLOY.parent
DOCKERFILE = DEPLOY / "Dockerfile"
INSTRUCTIONS = re.findall(r"^([A-Z]+) (.*)$", DOCKERFILE.read_text(encoding="utf-8").replace("\\\n", " "), re.MULTILINE)
# Everything is read-only except one folder, no capability remains, and the process is the first one of its namespace.
CONTAINED = """
mount --make-rprivate /
awk '{print $5}' /proc/self/mountinfo | while read -r mount; do mount -o remount,bind,ro "$mount" 2>/dev/null; done
mount -t tmpfs none "$TMPDIR" && mount -t proc none /proc || exit 1
! touch "$PWD/pyproject.toml" 2>/dev/null || exit 1
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


def values(name: str) -> list[str]:
    return [value for instruction, value in INSTRUCTIONS if instruction == name]


def test_hadolint_has_nothing_to_report() -> None:
    output_of(program("hadolint"), DOCKERFILE)


def test_what_is_copied_suffices_to_install_everything(tmp_path: Path) -> None:
    for value in values("COPY"):
        if value.startswith("--from="):
            continue
        *sources, destination = value.split()
        for source in sources:
            target = tmp_path / destination / (Path(source).name if destination.endswith("/") else "")
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(ROOT / source, target)
    assert (tmp_path / "tools/check_torch_build.py").exists()
    # Without a compiler, which would take a minute, the kernels are left out.
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", tmp_path]
    subprocess.run(build, check=True, capture_output=True, env=environment)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    tracked = output_of("git", "-C", ROOT, "ls-files", "mpt_grpc", "clients/python/mpt_grpc_client").split()
    assert {name.removeprefix("clients/python/") for name in tracked} <= set(ZipFile(wheel).namelist())


def test_signals_reach_the_server_and_its_flags_exist() -> None:
    (entrypoint,), (command,) = values("ENTRYPOINT"), values("CMD")[-1:]
    assert json.loads(entrypoint) == ["tini", "--", "mpt-grpc"]  # a list, so that no shell takes the signals
    assert _parser().parse_args(json.loads(command)).host == "0.0.0.0"
    assert int(values("USER")[-1].partition(":")[0]) > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make namespaces")
def test_a_server_runs_read_only_and_without_capabilities_and_drains(tmp_path: Path) -> None:
    contained = (program_or_skip("unshare"), "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", CONTAINED, "-")
    variables = [variable for variable in " ".join(values("ENV")).split() if not variable.startswith("PATH=")]
    environment = [variable.replace("/tmp", str(tmp_path)) for variable in (*variables, "TMPDIR=/tmp")]
    with running(cli=("env", *environment, *contained, *CLI)) as server:
        (check,) = values("HEALTHCHECK")
        url = server.openai_url.removesuffix("/v1")
        test = json.loads(check.partition(" CMD ")[2].replace("http://localhost:8451", url))
        output_of(sys.executable, *test[1:])
        (first,) = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(first), signal.SIGTERM)
        assert server.wait() == 0
        assert "draining" in server.stderr
