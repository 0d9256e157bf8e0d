"""Turns a request's token events into deltas for its reader: assembles text, finds its end, and applies guards.

Owns what a reader has been sent. The scheduler thread owns the sequences; it is only told, through `end`, that an
output has ended by its text. Runs on the reader's side: on the event loop, or in a thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from mpt_grpc.engine.pace import Pace
from mpt_grpc.request import ChunkOptions
from mpt_grpc.results import Finish, FinishReason, OutputDelta, TokenEvent, TokenLogprob
from mpt_grpc.text.detokenizer import TextAssembler
from mpt_grpc.text.guards import OutputWatch

_TEXTLESS = (FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN)
End = Callable[[Finish], None]
"""Tells the engine that an output has ended, so that it generates no more tokens for it."""


class OutputAssembly(Protocol):
    """Assembles one output of a request."""

    finish: Finish | None
    """Why the output ended; set when all of it has been fed."""

    def resume(self) -> None:
        """Reads the resumed tokens, of which the reader has the text; called once, before the first event."""
        ...

    def feed(self, event: TokenEvent) -> None:
        """Adds the next event of the output; those after its end are ignored, except the last."""
        ...

    def take(self) -> OutputDelta | None:
        """Removes and returns what may be sent now, or None if that is nothing."""
        ...


class RequestAssembly:
    """Assembles all outputs of one request. It ends when all of them have ended, or when the request fails."""

    error: Exception | None = None
    """The error that ended the request, to be raised after all earlier deltas are delivered."""

    def __init__(
        self, outputs: Mapping[int, OutputAssembly], chunks: ChunkOptions, *, is_guarded: bool, begins_slowly: bool
    ) -> None:
        """`outputs` are ordered by their indices. `begins_slowly` says whether the first `advance` may take long."""
        self.is_slow = is_guarded or begins_slowly
        """Whether the next `advance` may take long, as one that runs the code of guards."""
        self._is_guarded, self._has_begun = is_guarded, False
        self.ended = False
        self._outputs, self._pace = outputs, Pace(chunks)
        self.num_tokens = 0
        """The number of tokens in the deltas so far."""

    @property
    def finishes(self) -> tuple[Finish, ...]:
        """Why those outputs ended whose ends are in the deltas so far."""
        return tuple(output.finish for output in self._outputs.values() if output.finish is not None)

    def advance(self, events: Iterable[TokenEvent]) -> list[OutputDelta]:
        """Processes events and returns the deltas to send, at most one per output; the last of all has `stats`."""
        if not self._has_begun:
            self._has_begun = True
            for output in self._outputs.values():
                output.resume()
            self.is_slow = self._is_guarded
        stats = None
        for event in events:
            if event.error is not None:
                self.error, self.ended = event.error, True
            else:
                self._outputs[event.index].feed(event)
                self._pace.feed(event)
                stats = event.stats
        due = self._pace.due(has_failed=self.error is not None)
        deltas = [delta for index in due if (delta := self._outputs[index].take()) is not None]
        for delta in deltas:
            self.num_tokens += len(delta.token_ids)
        if stats is not None:
            self.ended = True
            stats = replace(stats, num_output_tokens=self.num_tokens, finishes=self.finishes)
            deltas[-1] = deltas[-1]._replace(stats=stats)
        return deltas


class PlainOutput:
    """Assembles an output without a guard: sends each token at once, and its text unless a stop string may begin in it.

    The reader already has the text of `resume_token_ids` as far as it was not held back.
    """

    def __init__(self, index: int, text: TextAssembler, end: End, resume_token_ids: Sequence[int] = ()) -> None:
        self.finish: Finish | None = None
        self._index, self._assembler, self._end = index, text, end
        self._resume_token_ids = resume_token_ids
        self._stop: Finish | None = None
        """The finish by a stop string, whose event is yet to come."""
        self._text = ""
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def resume(self) -> None:
        for token_id in self._resume_token_ids:
            self._assembler.feed(token_id)
        self._find_stop()

    def feed(self, event: TokenEvent) -> None:
        if event.prompt_logprobs:
            self._prompt_logprobs = event.prompt_logprobs
        token_id, finish = event.token_id, event.finish
        if token_id is not None and self._stop is None:
            self._token_ids.append(token_id)
            if event.logprob is not None:
                self._logprobs.append(event.logprob)
            if finish is None or not _is_textless(token_id, finish):
                self._text += self._assembler.feed(token_id)
                self._find_stop()
        if finish is not None:
            self._text += self._assembler.finish()  # empty after a stop string, but it may also complete one
            self._find_stop()
            self.finish = self._stop or finish

    def take(self) -> OutputDelta | None:
        if not (self._text or self._token_ids or self._prompt_logprobs or self.finish is not None):
            return None
        delta = OutputDelta(
            self._index,
            self._text,
            tuple(self._token_ids),
            tuple(self._logprobs),
            self._prompt_logprobs,
            self.finish,
        )
        self._text, self._token_ids, self._logprobs, self._prompt_logprobs = "", [], [], ()
        return delta

    def _find_stop(self) -> None:
        stop_string = self._assembler.stop_string
        if stop_string is not None and self._stop is None:
            self._stop = Finish(FinishReason.STOP_STRING, stop_string=stop_string)
            self._end(self._stop)


@dataclass(frozen=True)
class _HeldToken:
    """A token that is held back until its text is sent."""

    token_id: int
    logprob: TokenLogprob | None
    text_end: int | None
    """The offset in the output's text where the token's text ends; None if only a later token completes it."""


class GuardedOutput:
    """Assembles an output under a guard: sends tokens with their text, each when the guard has released all of it."""

    def __init__(
        self, index: int, text: TextAssembler, watch: OutputWatch, end: End, resume_token_ids: Sequence[int] = ()
    ) -> None:
        self.finish: Finish | None = None
        self._index, self._assembler, self._watch, self._end = index, text, watch, end
        self._resume_token_ids = resume_token_ids
        self._event_finish: Finish | None = None
        self._has_told_end = False
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._held: deque[_HeldToken] = deque()
        self._num_assembled = 0
        """The number of characters that the text assembler has returned."""
        self._unchecked = ""
        """Text that the guard has not seen."""
        self._released, self._released_start = "", 0
        """The text that may be sent, and its offset in the output's text."""
        self._num_sent = 0
        """The number of characters that the reader has; of a resumed output, it has some from the beginning."""

    def resume(self) -> None:
        for token_id in self._resume_token_ids:
            self._feed_token(token_id)
        self._num_sent = self._num_assembled + self._assembler.num_held  # the guard had released all of it

    def feed(self, event: TokenEvent) -> None:
        self._prompt_logprobs = self._prompt_logprobs or event.prompt_logprobs
        token_id, finish = event.token_id, event.finish
        if token_id is not None and not self._is_over:
            text_end = None
            if finish is None or not _is_textless(token_id, finish):
                text_end = self._feed_token(token_id)
            self._held.append(_HeldToken(token_id, event.logprob, text_end))
        if finish is not None:
            self._unchecked += self._assembler.finish()
            self._event_finish = finish

    def take(self) -> OutputDelta | None:
        is_last = self._event_finish is not None
        self._check(is_last)
        if self._is_over and not self._has_told_end:
            self._has_told_end = True
            self._end(self._own_finish())
        tokens, text = self._take_sendable(is_last)
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        if is_last:
            self.finish = self._own_finish() if self._is_over else self._event_finish
        if not (text or tokens or prompt_logprobs or is_last):
            return None
        token_ids = tuple(token.token_id for token in tokens)
        logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
        return OutputDelta(self._index, text, token_ids, logprobs, prompt_logprobs, self.finish)

    @property
    def _is_over(self) -> bool:
        return self._assembler.stop_string is not None or self._watch.blocked

    def _own_finish(self) -> Finish:
        if self._watch.blocked:
            return Finish(FinishReason.CONTENT_FILTER)
        return Finish(FinishReason.STOP_STRING, stop_string=self._assembler.stop_string)

    def _feed_token(self, token_id: int) -> int | None:
        """Adds a token's text; returns where the text ends, or None if only a later token completes it."""
        before = self._num_assembled + self._assembler.num_held
        piece = self._assembler.feed(token_id)
        self._num_assembled += len(piece)
        self._unchecked += piece
        after = self._num_assembled + self._assembler.num_held
        return after if after > before else None

    def _check(self, is_last: bool) -> None:
        """Passes the unchecked text to the guard, and adds what it releases to `_released`."""
        text, self._unchecked = self._unchecked, ""
        if self._watch.blocked:
            return
        released = self._watch.feed(text) if text else ""
        if is_last and not self._watch.blocked:
            released += self._watch.finish()
        self._released += released

    def _take_sendable(self, is_last: bool) -> tuple[list[_HeldToken], str]:
        """Removes and returns the tokens and the text that may be sent now."""
        released_end = self._released_start + len(self._released)
        if is_last and not self._watch.blocked:
            tokens, end = list(self._held), released_end
            self._held.clear()
        else:
            tokens = self._pop_released_tokens(released_end)
            ends = [token.text_end for token in tokens if token.text_end is not None]
            end = released_end if is_last else max([self._num_sent, *ends])
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


def _is_textless(token_id: int, finish: Finish) -> bool:
    """Whether a token's text is omitted because the token ended the output."""
    return finish.reason in _TEXTLESS and token_id == finish.stop_token_id
