"""One sequence on its way: the tokens that are known and how many of them are computed.

There are no phases. A prompt, a chunk of one, the newest token, what a preemption has to do again and what an output
brings along that is resumed are all just tokens that are known and not yet computed.
"""

from __future__ import annotations

from dataclasses import replace

from mpt_grpc.request import GenerationRequest, TokenLogprob, sequence_seed
from mpt_grpc.schedule.block_pool import Digest, block_digest, root_digest
from mpt_grpc.schedule.repetition import RepetitionDetector
from mpt_grpc.step import Matcher, PromptScoring, SequenceStep, TokenChoice


class Sequence:
    """The state of one output of a request; only the scheduler changes it."""

    def __init__(
        self,
        sequence_id: int,
        request: GenerationRequest,
        index: int,
        prompt_token_ids: tuple[int, ...],
        eos_token_ids: frozenset[int] = frozenset(),
        matcher: Matcher | None = None,
        leader: Sequence | None = None,
    ) -> None:
        """`leader` is the sequence of the same request that computes the prompt for this one, if that is another."""
        self.sequence_id, self.request, self.index = sequence_id, request, index
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.eos_token_ids = frozenset() if request.stopping.ignore_eos else eos_token_ids
        self.num_computed = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the prompt's tokens from the second on; only the leader's are asked for."""
        self.block_table: tuple[int, ...] = ()
        self.num_published = 0
        """Leading blocks that can be found by others."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the cache when it first ran; None before."""
        self.num_preemptions = 0
        self.leader = leader
        self.followers: list[Sequence] = []
        """The request's other sequences, as long as they wait for this one to compute the prompt."""
        self._matcher = matcher
        self._sampling = replace(request.sampling, seed=sequence_seed(request.sampling.seed or 0, index))
        guard = request.stopping.repetition_guard
        self._repetition = None if guard is None else RepetitionDetector(guard)
        self._digests: list[Digest] = []

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first: by priority, then by arrival."""
        return (-self.request.priority, self.sequence_id)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_token(self) -> bool:
        """False for a prompt that is only computed."""
        return self.num_output_tokens != self.request.stopping.max_new_tokens

    @property
    def num_wanted(self) -> int:
        """Tokens that need room: the known ones and the next."""
        return len(self.token_ids) + self.wants_token

    @property
    def num_usable(self) -> int:
        """Leading tokens that may come from the cache: the last is always computed, and so is all that is scored."""
        last = len(self.token_ids) - 1
        return min(last, len(self.prompt_logprobs)) if self._is_scoring else last

    @property
    def _is_scoring(self) -> bool:
        wanted = self.request.logprobs.prompt and self.leader is None
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    def append(self, token_id: int) -> tuple[bool, bool]:
        """Adds a token to the output; returns whether its constraint is complete, and whether it goes in circles."""
        self.token_ids.append(token_id)
        is_complete = self._matcher is not None and self._matcher.advance(token_id)
        is_looping = self._repetition is not None and self._repetition.feed(token_id)
        return is_complete, is_looping

    def digests(self, num_blocks: int, block_size: int) -> list[Digest]:
        """The digests of the first `num_blocks` blocks, all of whose tokens are known."""
        while len(self._digests) < num_blocks:
            parent = self._digests[-1] if self._digests else root_digest(self.request.cache.salt)
            start = len(self._digests) * block_size
            self._digests.append(block_digest(parent, self.token_ids[start : start + block_size]))
        return self._digests[:num_blocks]

    def start(self, blocks: list[int], num_tokens: int) -> None:
        """Begins to run with `num_tokens` found in the cache, in `blocks`."""
        self.block_table, self.num_computed, self.num_published = tuple(blocks), num_tokens, len(blocks)
        if self.num_cached_tokens is None:
            self.num_cached_tokens = min(num_tokens, self.num_prompt_tokens)

    def release(self) -> tuple[int, ...]:
        """Forgets what was computed, and returns the blocks that held it."""
        blocks, self.block_table, self.num_computed, self.num_published = self.block_table, (), 0, 0
        return blocks

    def step(self, num_tokens: int) -> SequenceStep:
        """The plan to compute the next `num_tokens`."""
        end = self.num_computed + num_tokens
        return SequenceStep(
            sequence_id=self.sequence_id,
            request_id=self.request_id,
            token_ids=tuple(self.token_ids[self.num_computed : end]),
            start=self.num_computed,
            block_table=self.block_table,
            choice=self._choice() if end == len(self.token_ids) and self.wants_token else None,
            scoring=self._scoring(end) if self._is_scoring else None,
        )

    def _choice(self) -> TokenChoice:
        request, decoding = self.request, self.request.decoding
        repeats = decoding.repetition_penalty != 1
        penalizes = repeats or decoding.frequency_penalty != 0 or decoding.presence_penalty != 0
        is_short = self.num_output_tokens < request.stopping.min_new_tokens
        return TokenChoice(
            sampling=self._sampling,
            output_position=self.num_output_tokens,
            decoding=decoding,
            prompt_token_ids=tuple(self.token_ids[: self.num_prompt_tokens]) if repeats else (),
            output_token_ids=tuple(self.token_ids[self.num_prompt_tokens :]) if penalizes else (),
            forbidden_token_ids=(*self.eos_token_ids, *request.stopping.stop_token_ids) if is_short else (),
            matcher=self._matcher,
            num_top_logprobs=request.logprobs.num_top if request.logprobs.output else None,
        )

    def _scoring(self, end: int) -> PromptScoring | None:
        first, last = max(len(self.prompt_logprobs), self.num_computed), min(end, self.num_prompt_tokens - 1)
        if first >= last:
            return None
        token_ids = tuple(self.token_ids[first + 1 : last + 1])
        return PromptScoring(first - self.num_computed, token_ids, self.request.logprobs.num_top)
