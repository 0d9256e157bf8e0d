"""Compiles a request's constraint into a matcher, which determines the tokens that may come next.

This module limits the cost of constraints. llguidance (https://github.com/guidance-ai/llguidance) computes the masks
from the grammars that `grammar.py` makes. The engine decides when masks are computed and applied.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import is_dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from mpt_grpc.conversation import OutputConstraint
from mpt_grpc.errors import FieldViolation, InvalidRequestError, OverloadedError
from mpt_grpc.text.grammar import constraint_field, make_grammar
from mpt_grpc.text.probe import Probe, SlowConstraintError
from mpt_grpc.text.refusals import TOO_COSTLY, refusal_reason
from mpt_grpc.text.refused_places import with_place
from mpt_grpc.text.tokenizer import Tokenizer

CACHE_BYTES = 32 << 20
"""The total size of the constraints whose verdicts are cached, with their grammars."""
_ENTRY_BYTES = 512  # the objects around the texts
_MAX_ENTRY_BYTES = CACHE_BYTES // 16
_PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 10_000,
    "max_items_in_row": 1_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 50_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
"""Limits for llguidance. Ordinary schemas need a tenth: an object with 200 optional fields has 807 items in a row."""


class ConstraintCompiler:
    """Compiles constraints into matchers for one model. May be shared by threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Llguidance's copy of the vocabulary is only prepared when the first constraint is compiled."""
        self._tokenizer = tokenizer
        self._tokens = _Tokens(tokenizer)
        self._vocabulary: LLTokenizer | None = None
        self._probe = Probe(_PARSER_LIMITS)
        self._verdicts: OrderedDict[OutputConstraint, str | FieldViolation] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def compile(
        self, constraint: OutputConstraint, ends: Collection[int] = (), *, may_be_slow: bool = True
    ) -> ConstraintMatcher:
        """Returns a new matcher. A constraint not in the cache takes a few milliseconds, and at worst a few seconds.

        ends: special tokens that may end the output, besides the end-of-sequence tokens, where the constraint allows an
            end.
        may_be_slow: False raises SlowConstraintError for one not in the cache that takes longer than nearly all do.
        Raises InvalidRequestError, which names the field, if the constraint is malformed, unsupported, impossible to
        satisfy, or too costly; OverloadedError, if the machine is too busy to find out.
        """
        # Every output gets a new matcher, because copies of a matcher share a lexer with its lock and its budget.
        tokens = self._tokens.with_ends(ends) if ends else self._tokens
        return self._matcher(self._verified_grammar(constraint, may_be_slow), constraint_field(constraint), tokens)

    def _verified_grammar(self, constraint: OutputConstraint, may_be_slow: bool) -> str:
        with self._lock:
            verdict = self._verdicts.get(constraint)
        if verdict is None:
            verdict = self._verdict(constraint, may_be_slow)
        self._remember(constraint, verdict)
        if isinstance(verdict, FieldViolation):
            raise InvalidRequestError(verdict)
        return verdict

    def _verdict(self, constraint: OutputConstraint, may_be_slow: bool) -> str | FieldViolation:
        try:
            grammar = make_grammar(constraint)
        except InvalidRequestError as error:
            return error.violations[0]
        try:
            self._try(constraint, grammar, may_be_slow)
        except InvalidRequestError as error:
            violation = error.violations[0]
            if violation.description == TOO_COSTLY:  # it may be the whole that is, and no part
                return violation
            if not may_be_slow:  # finding the place takes longer
                raise SlowConstraintError from error
            return with_place(violation, constraint, self._refusal)
        return grammar

    def _refusal(self, constraint: OutputConstraint) -> str | None:
        """Returns why llguidance refuses a constraint; None if it does not, or if that takes long to find out."""
        try:
            self._try(constraint, make_grammar(constraint), may_be_slow=False)
        except InvalidRequestError as error:
            return error.violations[0].description
        except (SlowConstraintError, OverloadedError):
            return None
        return None

    def _try(self, constraint: OutputConstraint, grammar: str, may_be_slow: bool) -> None:
        field = constraint_field(constraint)
        self._probe.check(grammar, field, may_be_slow=may_be_slow)
        _try_two_steps(self._matcher(grammar, field, self._tokens))

    def _matcher(self, grammar: str, field: str, tokens: _Tokens) -> ConstraintMatcher:
        matcher = LLMatcher(self._shared_vocabulary(), grammar, limits=LLParserLimits(**_PARSER_LIMITS), log_level=0)
        return ConstraintMatcher(matcher, tokens, field)

    def _shared_vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _vocabulary(self._tokenizer, sorted(self._tokens.ends))
            return self._vocabulary

    def _remember(self, constraint: OutputConstraint, verdict: str | FieldViolation) -> None:
        size = _num_bytes(constraint, verdict)
        if size > _MAX_ENTRY_BYTES:
            return
        with self._lock:
            if constraint not in self._verdicts:
                self._cached_bytes += size
            self._verdicts[constraint] = verdict
            self._verdicts.move_to_end(constraint)
            while self._cached_bytes > CACHE_BYTES:
                self._cached_bytes -= _num_bytes(*self._verdicts.popitem(last=False))


class ConstraintMatcher:
    """Implements `Matcher` with llguidance. May be used by several threads, but by only one at a time."""

    def __init__(self, matcher: LLMatcher, tokens: _Tokens, field: str) -> None:
        self._matcher, self._tokens, self._field = matcher, tokens, field

    def advance(self, token_id: int) -> bool:
        """Consumes a token; returns whether the output is complete.

        It is complete after an end-of-sequence token, and where only such a token could follow. Raises
        InvalidRequestError for the constraint if it has become too costly, or for `resume_token_ids` if the token
        cannot follow: tokens that `mask` allows are never refused, so it can only be a resumed one.
        """
        if token_id in self._tokens.ends and self._matcher.is_accepting():
            return True
        is_text = token_id >= 0 and self._tokens.text_bits >> token_id & 1
        if not is_text or self._matcher.is_stopped() or self._matcher.validate_tokens([token_id]) == 0:
            self._check()
            why = f"{token_id} is not allowed by {self._field} here: resume with tokens generated under that constraint"
            raise InvalidRequestError(FieldViolation("resume_token_ids", why))
        self._matcher.consume_token(token_id)
        self._check()
        if self._matcher.is_stopped():
            return True
        # For a model without end-of-sequence tokens, the output is complete where it may end and no token can follow.
        return not self._tokens.ends and self._matcher.is_accepting() and self._allowed() == 0

    def masks(self, drafts: Sequence[int]) -> list[bytes]:
        """Returns the masks that `Matcher.masks` describes; the first is that of `mask`, with its errors."""
        masks = [self.mask()]
        if drafts and masks[0][drafts[0] >> 3] >> (drafts[0] & 7) & 1:
            # In a copy: the costs of a draft, which may be wrong, must not end the output.
            ahead = ConstraintMatcher(self._matcher.deep_copy(), self._tokens, self._field)
            with suppress(InvalidRequestError):  # the draft is not allowed or too costly
                for draft in drafts:
                    if ahead.advance(draft):
                        break
                    masks.append(ahead.mask())
        return masks

    def mask(self) -> bytes:
        """Returns the tokens that may come next as a bit mask of (vocab_size + 7) // 8 bytes.

        End-of-sequence tokens are included only where the output may end, other special tokens never. Raises
        InvalidRequestError if no token is allowed or the computation is too costly.
        """
        allowed = self._allowed()
        if allowed == 0:
            why = "leads to a point where none of the model's tokens is allowed: change it"
            raise InvalidRequestError(FieldViolation(self._field, why))
        return allowed.to_bytes((self._tokens.size + 7) // 8, "little")

    def _allowed(self) -> int:
        allowed = int.from_bytes(self._matcher.compute_bitmask(), "little")
        self._check()  # after an error, the mask would only allow the output to end
        # A Lark grammar may refer to special tokens, even to those that end the output where it may not end.
        allowed &= self._tokens.text_bits
        return allowed | self._tokens.end_bits if self._matcher.is_accepting() else allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequestError(FieldViolation(self._field, refusal_reason(self._matcher.get_error())))


class _Tokens:
    """Bit sets of a vocabulary's text tokens and of those that end an output; bit i represents token i."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.size = tokenizer.vocab_size
        self.ends = frozenset(token_id for token_id in tokenizer.eos_token_ids if token_id < self.size)
        self.end_bits = sum(1 << token_id for token_id in self.ends)
        special = sum(1 << token_id for token_id in tokenizer.special_token_ids | self.ends)
        self.text_bits = ((1 << self.size) - 1) & ~special

    def with_ends(self, ends: Collection[int]) -> _Tokens:
        """Returns these sets with more tokens that end an output, none of which is text."""
        tokens = copy(self)
        tokens.ends = self.ends.union(ends)
        tokens.end_bits = sum(1 << token_id for token_id in tokens.ends)
        return tokens


class _Vocabulary:
    """The tokenizer interface that `TokenizerWrapper` expects. `encode` must never return special tokens."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int | None, encode: Callable[[str], Sequence[int]]) -> None:
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_token_ids | tokenizer.eos_token_ids)
        self.eos_token_id, self.bos_token_id = eos_token_id, None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return list(self._encode(text))


def _vocabulary(tokenizer: Tokenizer, ends: list[int]) -> LLTokenizer:
    """Returns llguidance's copy of the vocabulary. Takes under half a second for 50,000 tokens."""
    wrapped = TokenizerWrapper(_Vocabulary(tokenizer, ends[0] if ends else None, tokenizer.plain_text_encoder()))
    return LLTokenizer(wrapped, n_vocab=tokenizer.vocab_size, eos_token=ends or None)


def _num_bytes(constraint: OutputConstraint, verdict: str | FieldViolation) -> int:
    """Returns the size of an entry of the cache."""
    texts = [verdict if isinstance(verdict, str) else verdict.description]
    parts: list[Any] = [constraint]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, tuple):
            parts += part
        elif is_dataclass(part):
            parts += vars(part).values()  # numbers are small
    return sum(map(sys.getsizeof, texts)) + _ENTRY_BYTES


def _try_two_steps(matcher: ConstraintMatcher) -> None:
    """Takes two steps, which reveals most constraints that are impossible to satisfy or too costly."""
    mask = int.from_bytes(matcher.mask(), "little")
    if not matcher.advance((mask & -mask).bit_length() - 1):
        matcher.mask()
