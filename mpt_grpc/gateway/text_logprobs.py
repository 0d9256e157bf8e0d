"""The log probabilities of text completions, in OpenAI's older format: one list for each kind of value."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mpt_grpc.gateway.responses import Json, token_label
from mpt_grpc_client import TokenLogprob


class TextLogprobs:
    """The log probabilities of one choice, whose tokens are added in their order."""

    def __init__(self, num_top: int, start: int = 0) -> None:
        """num_top: the number of alternatives. start: where the first token begins in the text, in characters."""
        self._num_top, self._offset = num_top, start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, logprobs: Sequence[TokenLogprob], first: bytes | None = None) -> Json:
        """Returns the values of the next tokens.

        first: a token before them without a log probability, as a prompt's first one.
        """
        tokens = [] if first is None else [first]
        values: list[float | None] = [None] * len(tokens)
        top: list[Json | None] = [None] * len(tokens)
        for logprob in logprobs:
            tokens.append(logprob.token_bytes)
            values.append(logprob.logprob)
            others = {token_label(other.token_bytes): other.logprob for other in logprob.top_logprobs}
            top.append({**others, token_label(logprob.token_bytes): logprob.logprob})  # as OpenAI does
        return {
            "tokens": list(map(token_label, tokens)),
            "token_logprobs": values,
            "top_logprobs": top if self._num_top else None,
            "text_offset": list(map(self._next_offset, tokens)),
        }

    def _next_offset(self, token: bytes) -> int:
        """Returns where a token begins: tokens with bytes of the same character begin where it does."""
        offset = self._offset
        self._offset += len(self._utf8.decode(token))
        return offset
