"""Prepares requests for the scheduler: tokenizes the prompt, compiles the constraint, and validates all fields.

Nothing here accesses the scheduler, so any number of threads may prepare requests at the same time.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mpt_grpc.conversation import Conversation, ToolCalls
from mpt_grpc.engine.validation import RequestLimits, prompt_violations, request_violations, resumed_lists
from mpt_grpc.errors import CONTEXT_LENGTH_EXCEEDED, FieldViolation, InvalidRequestError, PromptRefusedError
from mpt_grpc.limits import MAX_TEXT_CHARACTERS
from mpt_grpc.request import GenerationRequest, StoppingCriteria
from mpt_grpc.step import Matcher
from mpt_grpc.text.chat import conversation_token_ids
from mpt_grpc.text.chat_template import ChatTemplate
from mpt_grpc.text.constraints import ConstraintCompiler
from mpt_grpc.text.guards import Guard
from mpt_grpc.text.tokenizer import QUICK_SIZE, Tokenizer, encodes_quickly
from mpt_grpc.worker_threads import WorkerThreads

_NUM_TEXT_THREADS, _NUM_CONSTRAINT_THREADS, _NUM_SLOW_THREADS = 2, 4, 2
_BIAS_COST = 8
"""How many times as long as a token of a list it takes to check a bias."""


@dataclass(frozen=True)
class PreparedRequest:
    """A validated request, ready for the scheduler."""

    request: GenerationRequest
    """The request with its seed and `max_new_tokens` filled in and the chat template's stop strings added."""
    prompt_token_ids: tuple[int, ...]
    matchers: tuple[Matcher, ...]
    """One matcher per sequence if the request has a constraint, else empty; they know the resumed tokens."""
    complete: frozenset[int] = frozenset()
    """The indices of the outputs that the resumed tokens complete under the constraint."""


class Preparers:
    """The threads in which requests are prepared, apart for those with constraints, and for slow ones."""

    def __init__(self) -> None:
        self.texts = WorkerThreads(_NUM_TEXT_THREADS, "prepare-text")
        self.constraints = WorkerThreads(_NUM_CONSTRAINT_THREADS, "prepare-constraint")
        self.slow_constraints = WorkerThreads(_NUM_SLOW_THREADS, "prepare-slow-constraint")

    def close(self) -> None:
        """Drops the requests that wait for their turn."""
        for threads in (self.texts, self.constraints, self.slow_constraints):
            threads.close()


class Preparation:
    """Prepares requests for one model."""

    def __init__(
        self, tokenizer: Tokenizer, limits: RequestLimits, chat_template: ChatTemplate, guards: Sequence[Guard] = ()
    ) -> None:
        self.tokenizer, self.limits, self.chat_template, self.guards = tokenizer, limits, chat_template, guards
        self._constraints = ConstraintCompiler(tokenizer)

    def is_quick(self, request: GenerationRequest) -> bool:
        """Whether `prepare` takes less than about a millisecond."""
        return self._is_short(request) and request.constraint is None and not self.guards

    def check_briefly(self, request: GenerationRequest) -> None:
        """Raises InvalidRequestError if the request is invalid, as far as shown without tokenizing or long lists."""
        if not isinstance(request.prompt, str) and self._is_short(request):
            self._valid_prompt(request)
        elif _has_short_lists(request) and (violations := list(request_violations(request, self.limits))):
            raise InvalidRequestError(*violations)

    def prepare(self, request: GenerationRequest, *, may_be_slow: bool = True) -> PreparedRequest:
        """Returns the request ready for the scheduler.

        Raises InvalidRequestError, which lists all invalid fields; PromptRefusedError; OverloadedError, if the machine
        is too busy to check a constraint; or SlowConstraintError, for a constraint that takes seconds, if it may not.
        """
        prompt_token_ids = self._valid_prompt(request)
        self._check_with_guards(prompt_token_ids)
        _ = request.decoding.allowed_mask  # computed here, and not in the scheduler thread
        request = self._resolved(request)
        matchers, complete = self._matchers(request, may_be_slow)
        return PreparedRequest(request, prompt_token_ids, matchers, complete)

    def _is_short(self, request: GenerationRequest) -> bool:
        prompt = request.prompt
        if isinstance(prompt, Conversation) or not _has_short_lists(request):
            return False
        return encodes_quickly(prompt) if isinstance(prompt, str) else len(prompt) <= QUICK_SIZE

    def _valid_prompt(self, request: GenerationRequest) -> tuple[int, ...]:
        """Returns the prompt's tokens. Raises InvalidRequestError, which lists all invalid fields."""
        violations = list(request_violations(request, self.limits))
        prompt_token_ids: tuple[int, ...] = ()
        try:
            prompt_token_ids = self._prompt_token_ids(request)
        except InvalidRequestError as error:
            violations += error.violations
        else:
            violations += prompt_violations(request, prompt_token_ids, self.limits)
        violations += self._resume_violations(request)
        if violations:
            raise InvalidRequestError(*violations)
        return prompt_token_ids

    def _prompt_token_ids(self, request: GenerationRequest) -> tuple[int, ...]:
        prompt, stopping = request.prompt, request.stopping
        if isinstance(prompt, Conversation):
            token_ids = conversation_token_ids(
                prompt,
                self.chat_template,
                self.tokenizer.encode,
                self.tokenizer.token_bytes,
                self.limits.max_context_tokens,
                stopping.max_new_tokens,
                special_texts=self.tokenizer.special_texts,
                max_token_bytes=self.limits.max_token_bytes,
            )
            remedy = "use messages and a chat template without it"
            self._check_tokens(token_ids, "conversation.messages", remedy)
            return token_ids
        if isinstance(prompt, str):
            self._check_length(prompt, is_truncated=request.truncate_prompt_tokens is not None)
            prompt = self.tokenizer.encode(prompt)
        if request.truncate_prompt_tokens:
            prompt = prompt[-request.truncate_prompt_tokens :]
        if isinstance(request.prompt, str):
            self._check_tokens(prompt, "text", "remove it")
        return prompt

    def _check_tokens(self, token_ids: tuple[int, ...], field: str, remedy: str) -> None:
        """Refuses tokens of the tokenizer that the model does not have."""
        if self.tokenizer.extra_tokens and (most := max(token_ids, default=0)) >= self.limits.vocab_size:
            text = self.tokenizer.decode((most,), skip_special_tokens=False)
            raise InvalidRequestError(FieldViolation(field, f"{text!r} is a token that the model lacks: {remedy}"))

    def _check_length(self, text: str, is_truncated: bool) -> None:
        """Refuses a text that is certainly too long, before spending time on tokenizing it."""
        longest = MAX_TEXT_CHARACTERS if is_truncated else self.limits.max_prompt_bytes
        if len(text) > longest:
            limit = "be truncated" if is_truncated else f"fit in the context of {self.limits.max_context_tokens} tokens"
            why = f"{len(text)} characters are too many to {limit}: shorten the prompt"
            raise InvalidRequestError(FieldViolation("text", why, CONTEXT_LENGTH_EXCEEDED))

    def _resume_violations(self, request: GenerationRequest) -> list[FieldViolation]:
        stopping = request.stopping
        ends = {*stopping.stop_token_ids, *(() if stopping.ignore_eos else self.tokenizer.eos_token_ids)}
        for field, token_ids in resumed_lists(request):
            for index, token_id in enumerate(token_ids[:-1]):
                if token_id in ends:
                    why = f"{token_id} ends the output, so no token can follow it"
                    return [FieldViolation(f"{field}[{index}]", why)]
        return []

    def _check_with_guards(self, prompt_token_ids: tuple[int, ...]) -> None:
        if self.guards:
            prompt = self.tokenizer.decode(prompt_token_ids, skip_special_tokens=False)
            for guard in self.guards:
                if (refusal := guard.refusal(prompt)) is not None:
                    raise PromptRefusedError(refusal)

    def _matchers(self, request: GenerationRequest, may_be_slow: bool) -> tuple[tuple[Matcher, ...], frozenset[int]]:
        """Returns one matcher per sequence, and the indices of the outputs that the resumed tokens complete."""
        constraint = request.constraint
        if constraint is None:
            return (), frozenset()
        if isinstance(constraint, ToolCalls):
            constraint = replace(constraint, stop_strings=request.stopping.stop_strings)
        ends = self.tokenizer.special_token_ids.intersection(request.stopping.stop_token_ids)
        matchers = tuple(self._constraints.compile(constraint, ends, may_be_slow=may_be_slow) for _ in request.outputs)
        complete = set()
        for matcher, (index, resumed) in zip(matchers, request.outputs.items(), strict=True):
            is_complete = False
            for token_id in resumed:
                is_complete = matcher.advance(token_id)
            if is_complete:
                complete.add(index)
        return matchers, frozenset(complete)

    def _resolved(self, request: GenerationRequest) -> GenerationRequest:
        sampling, stopping = request.sampling, request.stopping
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(64))
        if stopping.max_new_tokens is None:
            stopping = replace(stopping, max_new_tokens=self.limits.default_max_new_tokens)
        return replace(request, sampling=sampling, stopping=self._with_more_stops(stopping, request))

    def _with_more_stops(self, stopping: StoppingCriteria, request: GenerationRequest) -> StoppingCriteria:
        stop_strings = stopping.stop_strings
        if isinstance(request.prompt, Conversation):
            stop_strings = tuple(dict.fromkeys((*stop_strings, *self.chat_template.stop_strings)))
        # A special token's text is usually omitted from the output, so a stop string would not be found there.
        special = [self.tokenizer.special_token_id(stop) for stop in stop_strings]
        stop_token_ids = tuple(dict.fromkeys((*stopping.stop_token_ids, *(i for i in special if i is not None))))
        return replace(stopping, stop_strings=stop_strings, stop_token_ids=stop_token_ids)


def _has_short_lists(request: GenerationRequest) -> bool:
    decoding = request.decoding
    num_listed = sum(len(token_ids) for _, token_ids in resumed_lists(request)) + len(decoding.allowed_token_ids)
    return num_listed + _BIAS_COST * len(decoding.logit_bias) <= QUICK_SIZE
