"""`mpt-grpc eval`: measures the quality of a model with lm-eval through a server's OpenAI-compatible API."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpt_grpc.errors import EvaluationError

_STORY_ENDINGS = "story_endings"
_TOKEN_VARIABLE = "OPENAI_API_KEY"
_END_OF_DOCUMENT = "<|endoftext|>"


def run(parsed: argparse.Namespace) -> None:
    """Prints lm-eval's table, or its results as JSON. Raises EvaluationError."""
    names = parsed.tasks or ([] if parsed.text else [_STORY_ENDINGS])
    tasks = [_story_endings() if name == _STORY_ENDINGS else name for name in names]
    tasks += [_text(parsed.text)] if parsed.text else []
    model = _served_model(parsed.url)
    with _quiet():
        results = _evaluate(parsed, model, tasks)
    if parsed.json:
        print(json.dumps({"model": model["id"], "results": results["results"]}, ensure_ascii=False))
    else:
        from lm_eval.utils import make_table

        print(make_table(results).rstrip())


def _evaluate(parsed: argparse.Namespace, model: dict[str, Any], tasks: list[Any]) -> Any:
    if all(isinstance(task, dict) for task in tasks):
        # These tasks need no download.
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise EvaluationError("eval requires lm-eval; install the extra 'eval' (see docs/install.md)") from error
    try:
        return simple_evaluate(
            model="local-completions",
            model_args={
                "model": model["id"],
                "base_url": f"{parsed.url.rstrip('/')}/completions",
                "tokenizer_backend": "remote",
                "max_length": model["max_model_len"],
                "auth_token": os.environ.get(_TOKEN_VARIABLE),  # for the tokenizer; the model reads the variable itself
                "num_concurrent": parsed.num_concurrent,
            },
            tasks=tasks,
            task_manager=TaskManager(include_defaults=any(isinstance(task, str) for task in tasks)),
            limit=parsed.limit,
            log_samples=False,
        )
    except Exception as error:  # whatever a task's own code, a download or the connection may raise
        why = str(error.args[0] if isinstance(error, KeyError) else error).strip().partition("\n")[0]
        raise EvaluationError(f"lm-eval: {why or type(error).__name__}") from error


def _served_model(url: str) -> dict[str, Any]:
    request = urllib.request.Request(f"{url.rstrip('/')}/models")
    if token := os.environ.get(_TOKEN_VARIABLE):
        request.add_header("authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            model: dict[str, Any] = json.load(answer)["data"][0]
            return model
    except urllib.error.HTTPError as error:
        raise EvaluationError(f"--url: {url} refuses the request with {error.code} {error.reason}") from error
    except (OSError, ValueError, LookupError) as error:
        why = getattr(error, "reason", error)
        raise EvaluationError(f"--url: no server responds at {url}; start one with `mpt-grpc serve`: {why}") from error


def _story_endings() -> dict[str, Any]:
    """Returns a task of 64 beginnings of sentences from children's stories, each with four endings, one of them
    correct."""
    lines = Path(__file__).with_name("story_endings.jsonl").read_text(encoding="utf-8").splitlines()
    return _task(
        _STORY_ENDINGS,
        [json.loads(line) for line in lines],
        output_type="multiple_choice",
        doc_to_text="{{text}}",
        doc_to_choice="endings",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )


def _text(file: Path) -> dict[str, Any]:
    try:
        documents = [part.strip() for part in file.read_text(encoding="utf-8").split(_END_OF_DOCUMENT)]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"--text: cannot read {file}: {error}") from error
    rows = [{"text": document} for document in documents if document]
    if not rows:
        raise EvaluationError(f"--text: {file} is empty")
    return _task(
        f"text:{file.name}",
        rows,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("bits_per_byte", "byte_perplexity", "word_perplexity")],
    )


def _task(name: str, rows: list[dict[str, Any]], **config: Any) -> dict[str, Any]:
    def dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    return {"task": name, "custom_dataset": dataset, "test_split": "test", "metadata": {"version": 1}, **config}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval and its dependencies inside the block, except for progress bars in a terminal."""
    logging.disable(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
