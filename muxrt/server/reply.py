"""The reply to one HTTP request: its choices, from their first token to the usage at the end."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic

from muxrt.core import Output
from muxrt.metrics import Timing
from muxrt.server.answers import NUL, Frame, Usage, Writer, count_usage, split_event
from muxrt.server.call import Call
from muxrt.server.event_stream import EventStream
from muxrt.server.generation import Choice, Delta, Echo, merge
from muxrt.server.openai import Ask
from muxrt.server.prometheus import Metrics
from muxrt.server.served_model import EncodedPrompt, ServedModel


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an HTTP request, whether it was answered to its end or not."""

    prompt_tokens: int  # each prompt once
    output_tokens: int  # of all choices
    num_sequences: int
    timing: Timing  # of the first prompt's first choice


class Reply:
    """Follows the sequences of `call` to their ends; choice = prompt x n + which of the n."""

    def __init__(
        self,
        ask: Ask,
        model: ServedModel,
        prompts: Sequence[EncodedPrompt],
        call: Call,
        writer: Writer,
        arrived_s: float,
        metrics: Metrics,
    ) -> None:
        self._ask = ask
        self._model = model
        self._call = call
        self._writer = writer
        self._arrived_s = arrived_s
        self._metrics = metrics
        self._frames: dict[int, Frame] = {}  # by choice
        self._num_prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
        echoes = [self._echo(prompt) if ask.echo else None for prompt in prompts]
        self._choices = [self._choice(i, echoes[i // ask.n]) for i in range(ask.num_sequences)]

    def outcome(self) -> Outcome:
        """What has come so far."""
        num_tokens = sum(choice.num_tokens for choice in self._choices)
        timing = self._choices[0].timing(self._arrived_s)
        return Outcome(self._num_prompt_tokens, num_tokens, len(self._choices), timing)

    async def whole(self) -> bytes:
        """The body of an answer that does not stream. Raises MuxrtError."""
        parts: list[list[Delta]] = [[] for _ in self._choices]
        async for deltas in self._deltas():
            for index, delta in deltas:
                parts[index].append(delta)
        return self._writer.whole([merge(part) for part in parts], self._usage())

    async def stream(self, events: EventStream) -> None:
        """Send each token as it comes, and the usage; without [DONE]. Raises MuxrtError."""
        if not self._ask.options.continuous_usage_stats:
            self._call.quick = partial(self._write_soon, events)
        async for deltas in self._deltas():
            await events.write(b"".join([self._event(index, delta) for index, delta in deltas]))
        if self._ask.options.include_usage:
            await events.write(self._writer.usage_event(self._usage()))

    def _write_soon(self, events: EventStream, index: int, output: Output) -> bool:
        """Write what `output` adds, the road of most tokens; False if it must take the other one.

        Everything of an event but its text is the same for all events of a choice.
        """
        if not events.has_room:
            return False
        text = self._choices[index].take_plain(output, monotonic())
        if text is None:
            return False
        frame = self._frames.get(index)
        if frame is None:
            frame = self._frames[index] = split_event(self._event(index, NUL))
        events.write_soon(frame.before + text + frame.after)
        return True

    def _event(self, index: int, delta: Delta) -> bytes:
        options = self._ask.options
        if not options.include_usage and not options.continuous_usage_stats:
            return self._writer.event(index, delta)
        usage = self._usage() if options.continuous_usage_stats else None
        return self._writer.usage_event(usage, index, delta)

    async def _deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What each step adds to the choices, until all have ended."""
        num_open = len(self._choices)
        while num_open:
            deltas = []
            for index, output in await self._call.news():
                choice = self._choices[index]
                if choice.finish is not None:
                    continue  # it found its stop string; this was on its way
                delta = self._take(choice, output)
                num_open -= choice.finish is not None
                if not delta.is_empty:
                    deltas.append((index, delta))
            if deltas:
                yield deltas

    def _take(self, choice: Choice, output: Output) -> Delta:
        delta = choice.take(output, monotonic())
        if choice.finish is not None:
            if output.finish is None:
                self._call.abort(choice.index)  # a stop string: the unit does not know of it
            # A prompt's other choices did not start when the client asked: they time nothing.
            if choice.index % self._ask.n == 0:
                self._metrics.on_finish(self._ask.model, choice.timing(self._arrived_s))
        return delta

    def _usage(self) -> Usage:
        leaders = self._choices[:: self._ask.n]
        return count_usage(
            self._num_prompt_tokens,
            sum(choice.num_tokens for choice in self._choices),
            sum(choice.cached_tokens for choice in leaders),
        )

    def _choice(self, index: int, echo: Echo | None) -> Choice:
        ask = self._ask
        return Choice(
            index,
            self._model.tokenizer,
            stops=ask.stops,
            min_tokens=ask.sampling.min_tokens,
            is_scored=ask.sampling.logprobs is not None,
            echo=echo,
        )

    def _echo(self, prompt: EncodedPrompt) -> Echo:
        text = prompt.text
        if text is None:
            text = self._model.tokenizer.decode(list(prompt.tokens))
        return Echo(text, prompt.tokens)
