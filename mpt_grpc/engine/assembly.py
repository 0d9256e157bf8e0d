"""From a request's token events to its deltas: text, where it ends, and what a guard lets through."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mpt_grpc.request import Finish, FinishReason, OutputDelta, TokenEvent, TokenLogprob
from mpt_grpc.text.detokenizer import TextAssembler
from mpt_grpc.text.guards import OutputWatch

_TEXTLESS = (FinishReason.EOS_TOKEN, FinishReason.STOP_TOKEN)


class RequestAssembly:
    """All outputs of one request. Ends with the last of them, or with an error."""

    error: Exception | None = None
    """What the request ended with, once all that came before it is told."""

    def __init__(self, outputs: Sequence[OutputAssembly], end_request: Callable[[], None]) -> None:
        self._outputs, self._end_request = outputs, end_request
        self.is_guarded = any(output.is_guarded for output in outputs)
        """Whether `advance` runs code of a guard, which may take its time."""
        self.ended = False

    def advance(self, events: Iterable[TokenEvent]) -> list[OutputDelta]:
        """Returns what is new: at most one delta for each output."""
        by_index: dict[int, list[TokenEvent]] = {}
        for event in events:
            if event.error is not None:
                self.error, self.ended = event.error, True
            else:
                by_index.setdefault(event.index, []).append(event)
        deltas = [delta for index, some in by_index.items() if (delta := self._outputs[index].advance(some))]
        # The account comes with the event that ends the last output, so its delta goes last.
        deltas.sort(key=lambda delta: delta.stats is not None)
        self.ended = self.ended or any(delta.stats is not None for delta in deltas)
        return deltas

    def cancel(self) -> None:
        """Ends the request; without effect once it has ended. Any thread may call it."""
        if not self.ended:
            self._end_request()


@dataclass(frozen=True)
class _HeldToken:
    """A token that is told once its text is."""

    token_id: int
    logprob: TokenLogprob | None
    text_end: int | None
    """Where its text ends in the output's; None if only a later token completes it."""


class OutputAssembly:
    """One output. After a stop string, or a guard's objection, it only waits for the engine to end the sequence.

    Under a guard tokens and text are told together: a token once the guard lets all of its text through.
    """

    def __init__(
        self,
        index: int,
        text: TextAssembler,
        watch: OutputWatch | None,
        end_sequence: Callable[[], None],
        resume_token_ids: tuple[int, ...] = (),
    ) -> None:
        """`end_sequence` tells the engine that no more tokens are wanted; `resume_token_ids` are not told again."""
        self._index, self._text, self._watch, self._end_sequence = index, text, watch, end_sequence
        self._resume_token_ids = resume_token_ids
        self._held: deque[_HeldToken] = deque()
        self._num_assembled = 0
        """Characters that came out of the text assembler."""
        self._passed, self._passed_start = "", 0
        """Text that may be told, and where it begins in the output's."""
        self._num_told = 0
        """Characters that the caller has; one who resumes has some from the start."""

    @property
    def is_guarded(self) -> bool:
        return self._watch is not None

    def advance(self, events: Iterable[TokenEvent]) -> OutputDelta | None:
        """Returns what is new, if anything is."""
        was_over = self._is_over
        self._take_in_resumed()
        text, finish, stats = "", None, None
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        for event in events:
            prompt_logprobs += event.prompt_logprobs
            text += self._feed(event)
            finish, stats = event.finish, event.stats
        if finish is not None:
            text += self._text.finish()  # nothing after a stop string, but it may complete one
        self._pass(text, is_last=finish is not None)
        if self._is_over and not was_over:
            self._end_sequence()
        tokens, text = self._tell(is_last=finish is not None)
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

    def _take_in_resumed(self) -> None:
        token_ids, self._resume_token_ids = self._resume_token_ids, ()
        if token_ids:
            text = self._feed(TokenEvent("", self._index, token_ids))
            self._held.clear()
            self._pass(text, is_last=False)
            # A guard had let the whole text of these tokens through; without one, what a stop string holds is untold.
            self._num_told = self._num_assembled + (self._text.num_held if self.is_guarded else 0)

    def _feed(self, event: TokenEvent) -> str:
        """Returns the text of an event's tokens; those after a stop string do not belong to the output."""
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

    def _pass(self, text: str, is_last: bool) -> None:
        """Adds to `_passed` what the guard, if there is one, lets through."""
        if self._watch is not None and not self._watch.blocked:
            text = self._watch.feed(text) if text else ""
            if is_last and not self._watch.blocked:
                text += self._watch.finish()
        elif self._watch is not None:
            text = ""
        self._passed += text

    def _tell(self, is_last: bool) -> tuple[list[_HeldToken], str]:
        """The tokens and the text that may be told now."""
        passed_end = self._passed_start + len(self._passed)
        if self._watch is None or (is_last and not self._is_blocked):
            tokens, end = list(self._held), passed_end
            self._held.clear()
        else:
            tokens = self._pop_passed(passed_end)
            end = passed_end if is_last else max(self._num_told, *(token.text_end or 0 for token in tokens), 0)
        text = self._passed[max(0, self._num_told - self._passed_start) : end - self._passed_start]
        self._num_told = max(self._num_told, end)
        gone = min(len(self._passed), self._num_told - self._passed_start)
        self._passed, self._passed_start = self._passed[gone:], self._passed_start + gone
        return tokens, text

    def _pop_passed(self, passed_end: int) -> list[_HeldToken]:
        """Takes the first held tokens whose text has passed; one without an end goes with the next that has one."""
        count = 0
        for number, token in enumerate(self._held, start=1):
            if token.text_end is not None:
                if token.text_end > passed_end:
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
    """Whether a token's text is left out because it ended the output."""
    return finish is not None and finish.reason in _TEXTLESS and token_id == finish.stop_token_id
