"""Generates several outputs of one prompt, which is computed once, and ranks them by their mean log probability."""

from mpt_grpc_client import Client

with Client(timeout=60) as client:
    result = client.generate("The fox said", max_new_tokens=20, num_sequences=4, seed=1, return_logprobs=True)

ranked = sorted(
    result.outputs,
    key=lambda output: sum(token.logprob for token in output.logprobs) / max(1, output.num_tokens),
    reverse=True,
)
for output in ranked:
    print(f"seed {output.seed}: {output.text!r}")
