"""Checks that a wheel of the server contains the kernels for every instruction set.

Those that cannot be compiled are left out of an installation, but must not be missing from a release. Prints the
missing ones and exits with status 1.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

from mpt_grpc.model.native import INSTRUCTION_SETS


def missing_kernels(wheel: Path) -> list[str]:
    """Returns the instruction sets that a wheel has no kernels for. Only x86-64 has more than the portable one."""
    wanted = INSTRUCTION_SETS if "x86_64" in wheel.name else ("portable",)
    with zipfile.ZipFile(wheel) as opened:
        files = [Path(name) for name in opened.namelist() if name.startswith("mpt_grpc/model/native/")]
    found = {file.name.partition(".")[0] for file in files if file.suffix == ".so"}
    return [name for name in wanted if name not in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", type=Path, help="the wheel of mpt-grpc")
    wheel: Path = parser.parse_args().wheel
    if missing := missing_kernels(wheel):
        print(f"{wheel.name}: no kernels for {', '.join(missing)}; see the compiler's messages above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
