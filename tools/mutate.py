"""Mutation testing with Cosmic Ray: changes one operator or constant at a time, and prints the changes, called mutants,
that no test notices.

Each mutant is tested by the tests of its group, in a copy of the working tree, until the first one fails. Exits with
status 1 if fewer than 95% of the mutants are caught. Mutants that behave like the original are not counted: those that
`tools/equivalent_mutants.txt` lists in lines `PATH: PATTERN  # REASON`, with a regular expression for printed changes.

Usage: python tools/mutate.py [--all] [GROUP ...]
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from difflib import unified_diff
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers  # noqa: F401
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / "tools" / "equivalent_mutants.txt"
COPY = ROOT / "build" / "mutants"
GROUPS = {
    "schedule": ("mpt_grpc/schedule/*.py", "tests/schedule"),
    "logits": ("mpt_grpc/model/logits.py", "tests/model/test_logits.py tests/model/test_sampler.py"),
    "sampler": (
        "mpt_grpc/model/sampler.py mpt_grpc/model/draws.py mpt_grpc/model/logprobs.py",
        "tests/model/test_sampler.py tests/model/test_logits.py tests/model/test_logprobs.py",
    ),
    "attention": ("mpt_grpc/model/attention/torch_backend.py", "tests/model/test_parity.py -k 'none and not 12000'"),
    "detokenizer": ("mpt_grpc/text/detokenizer.py", "tests/text/test_detokenizer.py"),
    "assembly": ("mpt_grpc/engine/assembly.py mpt_grpc/engine/pace.py", "tests/engine/test_assembly.py"),
    "validation": ("mpt_grpc/engine/validation.py", "tests/engine/test_validation.py"),
    "wire": ("mpt_grpc/server/wire.py", "tests/server/test_wire.py"),
    "limits": ("mpt_grpc/limits.py", "tests/test_limits.py tests/engine/test_validation.py"),
}
"""The modules of each group and pytest's arguments for the tests that are to catch their mutants."""
SAMPLE = 32
"""The number of mutants of each group that are tested unless all are wanted."""
GOAL = 0.95
# Any example that fails will do, and the same ones are tried each time.
hypothesis.settings.register_profile(
    "mutants", deadline=None, derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
)
OPERATORS = {
    f"core/{name}"
    for name in (
        "NumberReplacer AddNot ZeroIterationForLoop ReplaceAndWithOr ReplaceOrWithAnd ReplaceTrueWithFalse"
        " ReplaceFalseWithTrue ReplaceBreakWithContinue ReplaceContinueWithBreak ReplaceUnaryOperator_Delete_Not"
        " ReplaceUnaryOperator_Delete_USub ReplaceUnaryOperator_Delete_Invert ReplaceBinaryOperator_Add_Sub"
        " ReplaceBinaryOperator_Sub_Add ReplaceBinaryOperator_Mul_FloorDiv ReplaceBinaryOperator_FloorDiv_Mul"
        " ReplaceBinaryOperator_Div_Mul ReplaceBinaryOperator_Mod_Mul ReplaceBinaryOperator_Pow_Mul"
        " ReplaceBinaryOperator_LShift_RShift ReplaceBinaryOperator_RShift_LShift ReplaceBinaryOperator_BitAnd_BitOr"
        " ReplaceComparisonOperator_Lt_LtE ReplaceComparisonOperator_LtE_Lt ReplaceComparisonOperator_Gt_GtE"
        " ReplaceComparisonOperator_GtE_Gt ReplaceComparisonOperator_Eq_NotEq ReplaceComparisonOperator_NotEq_Eq"
        " ReplaceComparisonOperator_Is_IsNot ReplaceComparisonOperator_IsNot_Is"
    ).split()
}
"""One replacement for each operator: Cosmic Ray knows ten, which the same tests catch."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Prints the changes to operators and constants that no test notices.")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"one of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--all", action="store_true", help=f"test all mutants, not a sample of {SAMPLE} per group")
    arguments = parser.parse_args()
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"unknown group: {', '.join(sorted(unknown))}; the groups are {', '.join(GROUPS)}")
    shutil.rmtree(COPY, ignore_errors=True)
    for name in ("clients", "docs", "mpt_grpc", "protos", "pyproject.toml", "tests"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, COPY / name)
    os.chdir(COPY)
    torch.set_num_threads(1)
    num_caught = num_tested = 0
    for group in arguments.groups or GROUPS:
        mutants = _mutants(group)
        if not arguments.all and len(mutants) > SAMPLE:
            mutants = random.Random(0).sample(mutants, SAMPLE)
        num_survivors = _print_survivors(group, mutants)
        print(f"{group}: {len(mutants) - num_survivors} of {len(mutants)} mutants were caught", flush=True)
        num_caught, num_tested = num_caught + len(mutants) - num_survivors, num_tested + len(mutants)
    print(f"{num_caught / num_tested:.1%} of {num_tested} mutants were caught; the goal is {GOAL:.0%}")
    return int(num_caught < GOAL * num_tested)


def _mutants(group: str) -> list[tuple[MutationSpec, str]]:
    """Returns the mutants of a group that are not equivalent, always in the same order, with their changes."""
    paths = [path for pattern in GROUPS[group][0].split() for path in sorted(Path().glob(pattern))]
    with use_db(":memory:") as db:
        init(paths, db, {})
        mutations = [item.mutations[0] for item in db.work_items if item.mutations[0].operator_name in OPERATORS]
    mutations.sort(key=lambda m: (m.module_path, m.start_pos, m.operator_name, m.occurrence))
    mutants = [(mutation, _change(mutation)) for mutation in mutations]
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines():
        path, pattern = line.rpartition("  # ")[0].split(": ", 1)
        if Path(path) in paths:
            counted = [mutant for mutant in mutants if not re.fullmatch(f"{re.escape(path)}: {pattern}", mutant[1])]
            if len(counted) == len(mutants):
                sys.exit(f"{EQUIVALENT.name} has a line that matches no mutant; remove it: {line}")
            mutants = counted
    return mutants


def _change(mutation: MutationSpec) -> str:
    """Returns the lines that a mutant changes, as `path: old -> new`."""
    source = mutation.module_path.read_text(encoding="utf-8")
    mutated = mutate_code(source, get_operator(mutation.operator_name)(), mutation.occurrence)
    diff = list(unified_diff(source.splitlines(), mutated.splitlines(), n=0))[3:]
    old, new = (" ".join(line[1:].strip() for line in diff if line.startswith(sign)) for sign in "-+")
    return f"{mutation.module_path}: {old} -> {new}"


def _print_survivors(group: str, mutants: list[tuple[MutationSpec, str]]) -> int:
    """Tests the mutants and prints those that no test notices; returns their number."""
    start = time.monotonic()
    assert _passes(_tests(group), timeout=None), f"the tests of {group} fail"
    timeout = 5 * (time.monotonic() - start)
    num_survivors = 0
    for mutation, change in mutants:
        with use_mutation(mutation.module_path, get_operator(mutation.operator_name)(), mutation.occurrence):
            if _passes(_tests(group, mutation.module_path), timeout):
                print(change, flush=True)
                num_survivors += 1
    return num_survivors


def _tests(group: str, module: Path | None = None) -> list[str]:
    """Returns pytest's arguments for the tests of a group; those named after the module, which fail soonest, first."""
    arguments = [
        str(path)
        for argument in shlex.split(GROUPS[group][1])
        for path in sorted(Path(argument).glob("test_*.py")) or [Path(argument)]
    ]
    return sorted(arguments, key=lambda path: module is None or Path(path).name != f"test_{module.name}")


def _passes(tests: list[str], timeout: float | None) -> bool:
    """Runs tests in a fork of this process, which saves them the imports of this one."""
    process = get_context("fork").Process(target=_test, args=(tests, timeout is None))
    process.start()
    process.join(timeout)
    process.kill()
    process.join()
    return process.exitcode == 0


def _test(tests: list[str], is_original: bool) -> None:
    sys.path[:0] = [str(COPY), str(COPY / "clients" / "python")]
    sys.dont_write_bytecode = not is_original  # a mutant's could be taken for that of the next one
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants", *tests]))


if __name__ == "__main__":
    sys.exit(main())
