"""The state of one sequence: its known tokens, how many of them have been computed, and why it ends.

There is no separate prefill or decode phase. A prompt, a chunk of one, the newest token, the tokens of a preempted
sequence and those of a resumed output are all just tokens that are known but not yet computed.
"""

from __future__ import annotations

from dataclasses import replace

from mpt_grpc.request import GenerationRequest, sequence_seed
from mpt_grpc.results import Finish, FinishReason, TokenLogprob
from mpt_grpc.schedule.block_pool import Digest, block_digest, root_digest
from mpt_grpc.schedule.repetition import RepetitionDetector
from mpt_grpc.step import Matcher, PromptScoring, SamplingInputs, SequenceStep


class Sequence:
    """The state of one output of a request; only the scheduler changes it."""

    def __init__(
        self,
        sequence_id: int,
        request: GenerationRequest,
        index: int,
        prompt_token_ids: tuple[int, ...],
        max_context_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        matcher: Matcher | None = None,
        primary: Sequence | None = None,
    ) -> None:
        """`primary` is the sequence of the same request that computes the prompt for this one; None on the primary."""
        self.sequence_id, self.request, self.index = sequence_id, request, index
        self.rank = (-request.priority, sequence_id)
        """The sort key of running sequences: lower is served first, by priority, then by arrival."""
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self._prompt_token_ids, self._max_context_tokens = prompt_token_ids, max_context_tokens
        self._eos_token_ids = frozenset() if request.stopping.ignore_eos else eos_token_ids
        self.num_computed = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        """Log probabilities of the prompt's tokens from the second on; computed on the primary only."""
        self.block_table: tuple[int, ...] = ()
        self.num_full_blocks = 0
        """The number of leading blocks whose tokens are all computed; they are in the prefix cache unless bypassed."""
        self.num_cached_tokens: int | None = None
        """The number of prompt tokens found in the prefix cache when the sequence first ran; None before that."""
        self.num_preemptions = 0
        self.primary = primary
        self.siblings: list[Sequence] = []
        """The request's other sequences, while they wait for this one to compute the prompt."""
        self._matcher = matcher
        self._max_new_tokens = request.stopping.max_new_tokens or 0
        self._num_resumed = len(request.outputs[index])
        self._scores_prompt = request.logprobs.prompt and primary is None
        self._penalizes_prompt = request.decoding.repetition_penalty != 1
        self._penalizes = request.decoding.penalizes
        self._choice = (_independent_choice(request, index, matcher),)
        """How a token is chosen unless it depends on those before it."""
        guard = request.stopping.repetition_guard
        self._repetition = None if guard is None else RepetitionDetector(guard)
        self._digests: list[Digest] = []

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """The number of tokens that the output may still get."""
        return self._max_new_tokens - self.num_output_tokens

    @property
    def max_remaining(self) -> int:
        """The number of tokens that the output may still get in the context."""
        return min(self.num_remaining, self._max_context_tokens - len(self.token_ids))

    @property
    def wants_token(self) -> bool:
        """Whether a token is to be chosen after the known ones; False if only the prompt is to be computed."""
        return self.num_remaining != 0

    @property
    def num_required(self) -> int:
        """The number of tokens that need space in the KV cache: the known ones and the next one, if any."""
        return len(self.token_ids) + self.wants_token

    @property
    def num_cacheable(self) -> int:
        """The number of leading tokens that may be cached: all but the last, and none that is yet to be scored."""
        last = len(self.token_ids) - 1
        is_scoring = self._scores_prompt and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
        return min(last, len(self.prompt_logprobs)) if is_scoring else last

    @property
    def is_at_first_token(self) -> bool:
        """Whether the last known token is the first that this request has added to the output."""
        return self.num_output_tokens == self._num_resumed + 1

    def resume(self, token_ids: tuple[int, ...], *, is_complete: bool) -> Finish | None:
        """Adds the tokens of a partial output; returns why it has ended with them, or None if it goes on.

        The matcher knows them already, and `is_complete` is whether they complete the constraint.
        """
        self.token_ids += token_ids
        is_looping = False
        if self._repetition is not None:
            for token_id in token_ids[-self._repetition.num_relevant :]:
                is_looping = self._repetition.feed(token_id)
        return self._finish(token_ids[-1], is_complete, is_looping)

    def append(self, token_id: int) -> Finish | None:
        """Adds a token to the output; returns why it has ended with it, or None if it goes on."""
        self.token_ids.append(token_id)
        is_complete = self._matcher is not None and self._matcher.advance(token_id)
        is_looping = self._repetition is not None and self._repetition.feed(token_id)
        return self._finish(token_id, is_complete, is_looping)

    def _finish(self, token_id: int, is_complete: bool, is_looping: bool) -> Finish | None:
        stopping = self.request.stopping
        if token_id in self._eos_token_ids:
            return Finish(FinishReason.EOS_TOKEN, stop_token_id=token_id)
        if token_id in stopping.stop_token_ids:
            return Finish(FinishReason.STOP_TOKEN, stop_token_id=token_id)
        if is_complete:
            return Finish(FinishReason.EOS_TOKEN)
        if self.num_output_tokens == self._max_new_tokens:
            return Finish(FinishReason.MAX_NEW_TOKENS)
        if len(self.token_ids) == self._max_context_tokens:
            return Finish(FinishReason.CONTEXT_LENGTH)
        if is_looping:
            return Finish(FinishReason.REPETITION)
        return None

    def digests(self, num_blocks: int, block_size: int) -> list[Digest]:
        """Returns the digests of the first `num_blocks` blocks; all tokens of these blocks must be known."""
        while len(self._digests) < num_blocks:
            parent = self._digests[-1] if self._digests else root_digest(self.request.cache.salt)
            start = len(self._digests) * block_size
            self._digests.append(block_digest(parent, self.token_ids[start : start + block_size]))
        return self._digests[:num_blocks]

    def start(self, blocks: list[int], num_tokens: int) -> None:
        """Starts running with the first `num_tokens` tokens taken from the prefix cache, in `blocks`."""
        self.block_table, self.num_computed, self.num_full_blocks = tuple(blocks), num_tokens, len(blocks)
        if self.num_cached_tokens is None:
            self.num_cached_tokens = min(num_tokens, self.num_prompt_tokens)

    def release(self) -> tuple[int, ...]:
        """Discards what has been computed and returns the blocks it occupied."""
        blocks, self.block_table, self.num_computed, self.num_full_blocks = self.block_table, (), 0, 0
        return blocks

    def step(self, num_tokens: int, drafts: tuple[int, ...] = ()) -> SequenceStep:
        """Returns the step that computes the next `num_tokens` tokens and, if these are all known ones, the drafts."""
        start, token_ids = self.num_computed, self.token_ids
        end, num_output_tokens = start + num_tokens, len(token_ids) - self.num_prompt_tokens
        chooses = end == len(token_ids) and num_output_tokens != self._max_new_tokens
        return SequenceStep(
            self.sequence_id,
            self.request.request_id,
            (*token_ids[start:end], *drafts),
            start,
            self.block_table,
            self._choices(num_output_tokens, drafts) if chooses else (),
            num_output_tokens,
            self._scoring(end) if self._scores_prompt else None,
        )

    def _choices(self, first: int, drafts: tuple[int, ...]) -> tuple[SamplingInputs, ...]:
        """Returns how the tokens at the output's positions from `first` on are chosen, one more than drafts."""
        if not (self._penalizes or first < self.request.stopping.min_new_tokens):
            return self._choice * (1 + len(drafts)) if drafts else self._choice
        output = (*self.token_ids[self.num_prompt_tokens :], *drafts)
        return tuple(self._dependent_choice(output[:position]) for position in range(first, first + 1 + len(drafts)))

    def _dependent_choice(self, output: tuple[int, ...]) -> SamplingInputs:
        """Returns how the token after these of the output is chosen."""
        stopping = self.request.stopping
        is_short = len(output) < stopping.min_new_tokens
        return replace(
            self._choice[0],
            prompt_token_ids=self._prompt_token_ids if self._penalizes_prompt else (),
            output_token_ids=output if self._penalizes else (),
            forbidden_token_ids=(*self._eos_token_ids, *stopping.stop_token_ids) if is_short else (),
        )

    def _scoring(self, end: int) -> PromptScoring | None:
        first, last = max(len(self.prompt_logprobs), self.num_computed), min(end, self.num_prompt_tokens - 1)
        if first >= last:
            return None
        token_ids = tuple(self.token_ids[first + 1 : last + 1])
        return PromptScoring(first - self.num_computed, token_ids, self.request.logprobs.num_top)


def _independent_choice(request: GenerationRequest, index: int, matcher: Matcher | None) -> SamplingInputs:
    """Returns how a token of an output is chosen where it does not depend on the tokens before it."""
    return SamplingInputs(
        replace(request.sampling, seed=sequence_seed(request.sampling.seed or 0, index)),
        request.decoding,
        matcher=matcher,
        num_top_logprobs=request.logprobs.num_top if request.logprobs.output else None,
    )
