"""`mpt-grpc eval` and lm-eval with a real server measure what transformers computes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tokenizers import Tokenizer
from transformers import MptForCausalLM

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mpt_grpc/demo"
ENDINGS = ROOT / "mpt_grpc/commands/story_endings.jsonl"
DOCUMENTS = (
    "The old rabbit said to his wife, “It is snowing.” And so it was.",
    "There was once a king who had three sons.\n\nThe youngest was kind; où est la lune? asked he.",
    "The fox and the bear went to the mill.",
)


@cache
def oracle() -> tuple[MptForCausalLM, Tokenizer]:
    model = MptForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    return model, Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def logprobs(ids: list[int]) -> torch.Tensor:
    """Returns the log probability of each token after the first, and whether it is the most likely: [2, tokens - 1]."""
    with torch.inference_mode():
        logprobs_of_vocabulary = oracle()[0](torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    chosen = logprobs_of_vocabulary.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return torch.stack((chosen, (logprobs_of_vocabulary.argmax(-1) == torch.tensor(ids[1:])).float()))


def encode(text: str) -> list[int]:
    return oracle()[1].encode(text, add_special_tokens=False).ids


def likelihood(context: str, continuation: str) -> tuple[float, bool]:
    """Returns the log probability of the continuation, and whether greedy decoding would generate it."""
    after = logprobs(encode(context + continuation))[:, len(encode(context)) - 1 :]
    return after[0].sum().item(), bool(after[1].all())


def rolling(text: str) -> float:
    """Returns the log probability of a whole document."""
    (end,) = encode("<|endoftext|>")
    return logprobs([end, *encode(text)])[0].sum().item()


@pytest.fixture
def harness(server: Any) -> Any:
    """lm-eval's model for servers with OpenAI's API."""
    url = f"{server.openai_url}/completions"
    return get_model("local-completions")(base_url=url, model="demo", tokenizer_backend="remote", num_concurrent=4)


def requests(kind: Any, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


def test_log_likelihoods_equal_those_of_transformers(harness: Any) -> None:
    pairs = [
        ("Once upon a time,", " and a little"),
        ("The king had a", " beautiful daughter"),
        ("“Où est", " la lune?”"),
    ]
    measured = harness.loglikelihood(requests("loglikelihood", pairs))
    for (total, greedy), pair in zip(measured, pairs, strict=True):
        expected, expected_greedy = likelihood(*pair)
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def test_rolling_log_likelihoods_equal_those_of_transformers(harness: Any) -> None:
    measured = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in DOCUMENTS]))
    assert measured == pytest.approx([rolling(text) for text in DOCUMENTS], abs=1e-3)


def test_text_is_generated_up_to_a_stop_string(harness: Any) -> None:
    prompts = [("Once upon a time", {"until": ["little"], "max_gen_toks": 20})]
    assert harness.generate_until(requests("generate_until", prompts)) == [", and a "]


def test_conversations_are_continued_up_to_a_stop_string(server: Any) -> None:
    url = f"{server.openai_url}/chat/completions"
    chat = get_model("local-chat-completions")(base_url=url, model="demo", num_concurrent=4)
    message = {"role": "user", "content": "Who are you?"}
    prompts = [(chat.apply_chat_template([message]), {"until": ["."], "max_gen_toks": 20}) for _ in range(2)]
    first, second = chat.generate_until(requests("generate_until", prompts))
    assert first == second
    assert first
    assert "." not in first


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "mpt_grpc.cli", "eval", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_built_in_task_has_the_accuracy_that_transformers_has(server: Any) -> None:
    ended = evaluate("--url", server.openai_url, "--json", "--limit", "12")
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    num_correct = 0
    for line in ENDINGS.read_text(encoding="utf-8").splitlines()[:12]:
        item = json.loads(line)
        totals = [likelihood(item["text"], f" {ending}")[0] for ending in item["endings"]]
        num_correct += totals.index(max(totals)) == item["answer"]
    results = json.loads(ended.stdout)
    assert results["model"] == "demo"
    assert results["results"]["story_endings"]["acc,none"] == pytest.approx(num_correct / 12)


def test_bits_per_byte_of_a_text_are_shown_in_a_table(server: Any, tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    ended = evaluate("--url", server.openai_url, "--text", str(file))
    assert ended.returncode == 0, ended.stderr
    bits = -sum(rolling(text) for text in DOCUMENTS) / math.log(2)
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    (row,) = (line for line in ended.stdout.splitlines() if "bits_per_byte" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1] == "text:stories.txt"
    assert float(cells[7]) == pytest.approx(bits / num_bytes, abs=1e-3)


def test_the_built_in_task_is_well_formed() -> None:
    items = [json.loads(line) for line in ENDINGS.read_text(encoding="utf-8").splitlines()]
    assert len({item["text"] for item in items}) == 64
    answers = [item["answer"] for item in items]
    assert [answers.count(position) for position in range(4)] == [16] * 4  # no position is correct more often
    assert all(len(set(item["endings"])) == 4 for item in items)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--url", "http://localhost:1/v1"), "--url: no server responds at http://localhost:1/v1"),
        (("--tasks", "no_such_task"), "lm-eval: Spec 'no_such_task' is not a registered task"),
        (("--text", "no/such/file"), "--text: cannot read no/such/file"),
    ],
)
def test_an_evaluation_that_fails_is_one_line(arguments: tuple[str, ...], message: str, server: Any) -> None:
    ended = evaluate("--url", server.openai_url, *arguments)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"mpt-grpc: {message}")
    assert not ended.stdout


def test_without_lm_eval_the_error_names_the_extra_to_install(server: Any) -> None:
    script = "import sys; sys.modules['lm_eval'] = None; from mpt_grpc.cli import main; sys.exit(main(sys.argv[1:]))"
    command = (sys.executable, "-c", script, "eval", "--url", server.openai_url)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "mpt-grpc: eval requires lm-eval; install the extra 'eval' (see docs/install.md)\n"
