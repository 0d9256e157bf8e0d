"""A stream that several servers continue in turn: what has arrived of it, and what is still to be requested.

A server that resumes an output needs all its tokens so far and its seed, and returns what follows, down to the bytes of
an incomplete character. So a request that may have to go on elsewhere has a seed and returns its token IDs, whether the
caller asked for them or not.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict

import grpc
from google.protobuf.duration_pb2 import Duration

from mpt_grpc_client.errors import UnavailableError
from mpt_grpc_client.proto.v1 import text_generation_pb2 as pb
from mpt_grpc_client.results import Resumption

_UNSEEN_CHUNK_TOKENS = 16
"""The size of the chunks of a stream whose reader waits for its end: that many tokens are lost with a server."""


class Continuation:
    """The request and the response of a stream over several servers."""

    def __init__(self, request: pb.GenerateRequest, *, resume_inexact: bool, is_unseen: bool) -> None:
        """resume_inexact: whether a server may continue whose tokens might not be the same.

        is_unseen: whether the reader of the stream waits for its end.
        """
        self._request, self._resume_inexact = pb.GenerateRequest(), resume_inexact
        self._request.CopyFrom(request)
        request = self._request
        if is_unseen:
            request.output_options.chunk_tokens = _UNSEEN_CHUNK_TOKENS
        self._returns_token_ids = request.output_options.return_token_ids
        request.output_options.return_token_ids = True
        if not request.sampling.HasField("seed"):
            request.sampling.seed = secrets.randbits(64)
        self._start_s: float | None = None
        """When the first request was made."""
        self._time_limit = Duration()
        self._time_limit.CopyFrom(request.stopping.time_limit)
        self._token_ids = defaultdict[int, list[int]](list)
        """The tokens of the outputs that have begun."""
        self._token_ids[0] += request.resume_token_ids
        self._ended: set[int] = set()
        self.has_ended = False
        """Whether all outputs have."""
        self._num_received = 0
        self._fingerprint = ""
        self._has_begun = self._is_resuming = False
        self.resumptions: list[Resumption] = []

    def request(self) -> pb.GenerateRequest:
        """Returns the request to send now."""
        request, options = self._request, self._request.output_options
        self._is_resuming = self._has_begun
        if self._has_begun:
            if request.sampling.num_sequences > 1:
                del request.resume_outputs[:]
                for index in range(request.sampling.num_sequences):
                    if index not in self._ended:
                        request.resume_outputs.add(index=index, token_ids=self._token_ids[index])
            else:
                request.resume_token_ids[:] = self._token_ids[0]
            request.resume_fingerprint = "" if self._resume_inexact else self._fingerprint
            # The prompt has arrived.
            options.return_prompt_token_ids = options.return_prompt_logprobs = False
            if not options.return_logprobs:
                options.ClearField("top_logprobs")
        if self._start_s is None:
            self._start_s = time.monotonic()
        elif request.stopping.HasField("time_limit"):
            left_s = self._time_limit.ToNanoseconds() / 1e9 - (time.monotonic() - self._start_s)
            request.stopping.time_limit.FromMicroseconds(max(1, round(left_s * 1e6)))
        return request

    def receive(self, chunk: pb.StreamGenerateResponse, target: str) -> pb.StreamGenerateResponse:
        """Returns a chunk as the one stream has it. Raises UnavailableError if its server must not continue."""
        if self._is_resuming:
            self._resume(chunk.fingerprint, target)
            chunk.ClearField("prompt")
        elif not self._has_begun:
            self._has_begun, self._fingerprint = True, chunk.fingerprint
            self._request.request_id = chunk.request_id
        output = chunk.output
        self._num_received += output.num_tokens
        self._token_ids[output.index] += output.token_ids
        if output.HasField("finish"):
            self._ended.add(output.index)
        if not self._returns_token_ids:
            output.ClearField("token_ids")
        if chunk.HasField("summary"):
            self.has_ended = True
            chunk.summary.usage.num_output_tokens = self._num_received
        return chunk

    def _resume(self, fingerprint: str, target: str) -> None:
        is_exact = fingerprint == self._fingerprint != ""
        if not fingerprint or not (is_exact or self._resume_inexact):
            why = "this server's fingerprint is not that of the server that began the output"
            code = grpc.StatusCode.FAILED_PRECONDITION
            raise UnavailableError(why, code=code, reason="FINGERPRINT_MISMATCH")
        self._is_resuming = False
        self.resumptions.append(Resumption(target, self._num_received, is_exact))
