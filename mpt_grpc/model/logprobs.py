"""Log probabilities of tokens under the model's raw logits, before any logits processing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpt_grpc.model.logits import top_tokens
from mpt_grpc.model.transfer import send
from mpt_grpc.results import TokenLogprob


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Returns the log probability of each row's token and of its `num_top` most likely tokens.

    `logits` is [n, vocab_size], float32. A rank is 1 plus the number of higher logits; ties in `top` are ordered by ID.
    """
    if not token_ids:
        return []
    own = send(torch.tensor(token_ids), logits.device)[:, None]
    ranks = (logits > logits.gather(1, own)).sum(dim=-1) + 1
    count = min(max(num_top), logits.shape[1])
    tokens = torch.cat([own, top_tokens(logits, count)], dim=1) if count else own
    logprobs = logits.log_softmax(dim=-1).gather(1, tokens).tolist()
    return [
        TokenLogprob(row_ids[0], row[0], rank, tuple(zip(row_ids[1 : 1 + num], row[1 : 1 + num], strict=True)))
        for row_ids, row, rank, num in zip(tokens.tolist(), logprobs, ranks.tolist(), num_top, strict=True)
    ]
