"""What the wheels and source distributions contain, and what their metadata states."""

from __future__ import annotations

import email.parser
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from mpt_grpc.model.native import available_instruction_sets
from mpt_grpc_client.version import __version__

ROOT = Path(__file__).parents[2]
NAMES = {"mpt-grpc": "mpt_grpc", "mpt-grpc-client": "mpt_grpc_client"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the kernels are compiled


def wheel_files(distributions: Path, name: str) -> dict[str, bytes]:
    (path,) = distributions.glob(f"{NAMES[name]}-*.whl")
    with zipfile.ZipFile(path) as wheel:
        return {file: wheel.read(file) for file in wheel.namelist()}


def sdist_files(distributions: Path, name: str) -> set[str]:
    """Returns paths inside the folder that a source distribution consists of."""
    (path,) = distributions.glob(f"{NAMES[name]}-*.tar.gz")
    with tarfile.open(path) as sdist:
        return {member.name.partition("/")[2] for member in sdist if member.isfile()}


def metadata(distributions: Path, name: str) -> Message:
    text = wheel_files(distributions, name)[f"{NAMES[name]}-{__version__}.dist-info/METADATA"]
    return email.parser.BytesParser().parsebytes(text)


@pytest.mark.parametrize("name", NAMES)
def test_the_metadata_states_version_and_licence(distributions: Path, name: str) -> None:
    stated = metadata(distributions, name)
    assert (stated["Name"], stated["Version"]) == (name, __version__)
    assert (stated["License-Expression"], stated["License-File"]) == ("Apache-2.0", "LICENSE")


def test_the_licence_is_included_everywhere(distributions: Path) -> None:
    licence = (ROOT / "LICENSE").read_bytes()
    for name, package in NAMES.items():
        assert wheel_files(distributions, name)[f"{package}-{__version__}.dist-info/licenses/LICENSE"] == licence
        assert "LICENSE" in sdist_files(distributions, name)


def test_the_server_requires_no_distribution_of_ours_from_an_index(distributions: Path) -> None:
    requirements = metadata(distributions, "mpt-grpc").get_all("Requires-Dist", [])
    ours = [line for line in requirements if line.startswith("mpt") and "extra ==" not in line]
    assert requirements
    assert ours == []


def test_both_distributions_require_what_the_client_needs(distributions: Path) -> None:
    server = names_required(metadata(distributions, "mpt-grpc"))
    assert names_required(metadata(distributions, "mpt-grpc-client")) <= server


def names_required(stated: Message) -> set[str]:
    return {re.split(r"[^\w-]", line)[0] for line in stated.get_all("Requires-Dist", [])}


def test_the_wheels_contain_every_file_of_their_packages(distributions: Path, source: Path) -> None:
    packages = {"mpt_grpc": source / "mpt_grpc", "mpt_grpc_client": source / "clients/python/mpt_grpc_client"}
    expected = {
        package: {f"{package}/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
        for package, folder in packages.items()
    }
    assert packaged(wheel_files(distributions, "mpt-grpc")) == expected["mpt_grpc"] | expected["mpt_grpc_client"]
    assert packaged(wheel_files(distributions, "mpt-grpc-client")) == expected["mpt_grpc_client"]
    assert {"mpt_grpc/demo/model.safetensors", "mpt_grpc/py.typed"} <= expected["mpt_grpc"]
    assert {"mpt_grpc_client/proto/v1/text_generation_pb2.pyi", "mpt_grpc_client/py.typed"} <= expected[
        "mpt_grpc_client"
    ]


def packaged(files: dict[str, bytes]) -> set[str]:
    """Returns the files of a wheel, without those that are made when it is built."""
    return {file for file in files if ".dist-info/" not in file and not file.endswith(".so")}


@pytest.mark.parametrize("name", NAMES)
def test_no_distribution_contains_tests(distributions: Path, name: str) -> None:
    files = sdist_files(distributions, name) | set(wheel_files(distributions, name))
    assert [file for file in files if "test" in file] == []


def test_twine_accepts_all_four(distributions: Path) -> None:
    files = sorted(distributions.iterdir())
    assert len(files) == 4
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True, capture_output=True)


def kernels(wheel: Path) -> set[str]:
    """Returns the instruction sets whose kernels a wheel contains."""
    with zipfile.ZipFile(wheel) as opened:
        libraries = [Path(name) for name in opened.namelist() if name.endswith(".so")]
    return {library.name.partition(".")[0] for library in libraries if library.parent.name == "native"}


def test_the_wheel_of_the_server_contains_the_kernels_for_each_instruction_set(server_wheel: Path) -> None:
    assert kernels(server_wheel) >= set(available_instruction_sets()) >= {"portable"}
    checked = check_wheel(server_wheel)
    assert (checked.returncode, checked.stderr) == (0, "")


def check_wheel(wheel: Path) -> subprocess.CompletedProcess[str]:
    check = [sys.executable, "-m", "tools.check_wheel", wheel]
    return subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_server_is_built_without_kernels(source: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    missing = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    subprocess.run(build, check=True, capture_output=True, env=missing, cwd=tmp_path)
    (wheel,) = tmp_path.glob("mpt_grpc-*.whl")
    assert kernels(wheel) == set()
    checked = check_wheel(wheel)
    assert checked.returncode == 1
    assert f"{wheel.name}: no kernels for " in checked.stderr
