"""Turns a request's token events into output deltas: assembles text, finds its end, and applies guards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mpt_grpc.request import Finish, FinishReason, OutputDelta, TokenEvent, TokenLogprob
from mpt_grpc.text.detokenizer import TextAssembler
from mpt_grpc.text.guards import OutputWatch

_TEXTLESS = (FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN)


class RequestAssembly:
    """Assembles all outputs of one request. It ends when all of them have ended, or when the request fails."""

    error: Exception | None = None
    """The error that ended the request, to be raised after all earlier deltas are delivered."""

    def __init__(self, outputs: Sequence[OutputAssembly], end_request: Callable[[], None]) -> None:
        self._outputs, self._end_request = outputs, end_request
        self.is_guarded = any(output.is_guarded for output in outputs)
        """Whether `advance` runs guard code, which may be slow."""
        self.ended = False

    def advance(self, events: Iterable[TokenEvent]) -> list[OutputDelta]:
        """Processes events and returns the resulting deltas, at most one per output."""
        by_index: dict[int, list[TokenEvent]] = {}
        for event in events:
            if event.error is not None:
                self.error, self.ended = event.error, True
            else:
                by_index.setdefault(event.index, []).append(event)
        deltas = [delta for index, group in by_index.items() if (delta := self._outputs[index].advance(group))]
        # The request's statistics arrive with the event that ends the last output, so its delta goes last.
        deltas.sort(key=lambda delta: delta.stats is not None)
        self.ended = self.ended or any(delta.stats is not None for delta in deltas)
        return deltas

    def cancel(self) -> None:
        """Cancels the request; has no effect once it has ended. May be called from any thread."""
        if not self.ended:
            self._end_request()


@dataclass(frozen=True)
class _HeldToken:
    """A token that is held back until its text is sent."""

    token_id: int
    logprob: TokenLogprob | None
    text_end: int | None
    """The offset in the output's text where the token's text ends; None if only a later token completes it."""


class OutputAssembly:
    """Assembles one output. Once a stop string or a guard has ended it, only the engine's final event is awaited.

    With a guard, tokens are sent together with their text: each one when the guard has released all of its text.
    """

    def __init__(
        self,
        index: int,
        text: TextAssembler,
        watch: OutputWatch | None,
        end_sequence: Callable[[], None],
        resume_token_ids: tuple[int, ...] = (),
    ) -> None:
        """`end_sequence` asks the engine to generate no more tokens; `resume_token_ids` are not sent again."""
        self._index, self._text, self._watch, self._end_sequence = index, text, watch, end_sequence
        self._resume_token_ids = resume_token_ids
        self._held: deque[_HeldToken] = deque()
        self._num_assembled = 0
        """The number of characters that the text assembler has returned."""
        self._released, self._released_start = "", 0
        """The text that may be sent, and its offset in the output's text."""
        self._num_sent = 0
        """The number of characters that the caller has; a resumed request starts with some."""

    @property
    def is_guarded(self) -> bool:
        return self._watch is not None

    def advance(self, events: Iterable[TokenEvent]) -> OutputDelta | None:
        """Processes events and returns the resulting delta, or None if there is nothing to send."""
        was_over = self._is_over
        self._feed_resumed_tokens()
        text, finish, stats = "", None, None
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        for event in events:
            prompt_logprobs += event.prompt_logprobs
            text += self._feed(event)
            finish, stats = event.finish, event.stats
        if finish is not None:
            text += self._text.finish()  # empty after a stop string, but it may also complete one
        self._release(text, is_last=finish is not None)
        if self._is_over and not was_over:
            self._end_sequence()
        tokens, text = self._take_sendable(is_last=finish is not None)
        if not (text or tokens or prompt_logprobs or finish is not None):
            return None
        return OutputDelta(
            index=self._index,
            text=text,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprob for token in tokens if token.logprob is not None),
            prompt_logprobs=prompt_logprobs,
            finish=None if finish is None else self._finish(finish),
            stats=stats,
        )

    @property
    def _is_over(self) -> bool:
        return self._text.stop_string is not None or self._is_blocked

    @property
    def _is_blocked(self) -> bool:
        return self._watch is not None and self._watch.blocked

    def _feed_resumed_tokens(self) -> None:
        token_ids, self._resume_token_ids = self._resume_token_ids, ()
        if token_ids:
            text = self._feed(TokenEvent("", self._index, token_ids))
            self._held.clear()
            self._release(text, is_last=False)
            # A guard had released these tokens' whole text. Without one, text held for a stop string was not sent yet.
            self._num_sent = self._num_assembled + (self._text.num_held if self.is_guarded else 0)

    def _feed(self, event: TokenEvent) -> str:
        """Returns the text of an event's tokens, leaving out tokens after the end of the output."""
        text = ""
        for position, token_id in enumerate(event.token_ids):
            if self._is_over:
                break
            text_end = None
            if not _is_textless(token_id, event.finish):
                before = self._num_assembled + self._text.num_held
                piece = self._text.feed(token_id)
                self._num_assembled += len(piece)
                text += piece
                after = self._num_assembled + self._text.num_held
                text_end = after if after > before else None
            logprob = event.logprobs[position] if event.logprobs else None
            self._held.append(_HeldToken(token_id, logprob, text_end))
        return text

    def _release(self, text: str, is_last: bool) -> None:
        """Adds text to `_released`, as far as the guard, if there is one, allows it."""
        if self._watch is not None and not self._watch.blocked:
            text = self._watch.feed(text) if text else ""
            if is_last and not self._watch.blocked:
                text += self._watch.finish()
        elif self._watch is not None:
            text = ""
        self._released += text

    def _take_sendable(self, is_last: bool) -> tuple[list[_HeldToken], str]:
        """Removes and returns the tokens and the text that may be sent now."""
        released_end = self._released_start + len(self._released)
        if self._watch is None or (is_last and not self._is_blocked):
            tokens, end = list(self._held), released_end
            self._held.clear()
        else:
            tokens = self._pop_released_tokens(released_end)
            end = released_end if is_last else max(self._num_sent, *(token.text_end or 0 for token in tokens), 0)
        text = self._released[max(0, self._num_sent - self._released_start) : end - self._released_start]
        self._num_sent = max(self._num_sent, end)
        num_removed = min(len(self._released), self._num_sent - self._released_start)
        self._released, self._released_start = self._released[num_removed:], self._released_start + num_removed
        return tokens, text

    def _pop_released_tokens(self, released_end: int) -> list[_HeldToken]:
        """Removes and returns the leading tokens whose text is released.

        A token that does not complete any text goes together with the next one that does.
        """
        count = 0
        for number, token in enumerate(self._held, start=1):
            if token.text_end is not None:
                if token.text_end > released_end:
                    break
                count = number
        return [self._held.popleft() for _ in range(count)]

    def _finish(self, finish: Finish) -> Finish:
        if self._is_blocked:
            return Finish(FinishReason.CONTENT_FILTER)
        if self._text.stop_string is not None:
            return Finish(FinishReason.STOP_STRING, stop_string=self._text.stop_string)
        return finish


def _is_textless(token_id: int, finish: Finish | None) -> bool:
    """Whether a token's text is omitted because the token ended the output."""
    return finish is not None and finish.reason in _TEXTLESS and token_id == finish.stop_token_id
