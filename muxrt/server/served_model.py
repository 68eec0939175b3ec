"""A model as the API process knows it: its words, its limits, and what may be asked of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import getrandbits

import msgspec
import numpy as np

from muxrt.config.model import load_shape
from muxrt.config.placement import ModelSpec
from muxrt.core import SamplingParams
from muxrt.engine.messages import ModelReady
from muxrt.errors import BadRequest
from muxrt.server.chat_template import ChatTemplate, load_chat_template
from muxrt.server.dispatch import Draft
from muxrt.server.openai import Ask
from muxrt.server.prefix_keys import prefix_keys
from muxrt.server.tokenizer import Tokenizer, load_tokenizer

SEED_BITS = 63


class ContextOverflow(BadRequest):
    """Prompt and answer together are longer than the model can hold."""

    code = "context_length_exceeded"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt in tokens, checked against the vocabulary."""

    tokens: Sequence[int]
    text: str | None  # as the client wrote it; None where it sent token ids
    data: bytes  # the tokens: int32, little endian
    keys: tuple[bytes, ...]


class ServedModel:
    """Everything of a model that the edge needs; immutable once loaded."""

    def __init__(
        self,
        spec: ModelSpec,
        vocab_size: int,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._template = template

    @classmethod
    def load(cls, spec: ModelSpec) -> "ServedModel":
        """Read the model's folder. Raises ConfigError."""
        folder = spec.folder
        vocab_size = load_shape(folder).vocab_size
        return cls(spec, vocab_size, load_tokenizer(folder), load_chat_template(folder))

    def with_spec(self, spec: ModelSpec) -> "ServedModel":
        """The same words under other limits."""
        return ServedModel(spec, self._vocab_size, self.tokenizer, self._template)

    def encode(self, ask: Ask, ready: ModelReady, salt: bytes = b"") -> list[EncodedPrompt]:
        """The prompts of `ask` in tokens. Pure computation, long for long prompts.

        Raises BadRequest for what this model cannot read.
        """
        self._check_ids("stop_token_ids", ask.sampling.stop_token_ids)
        self._check_ids("logit_bias", ask.sampling.logit_bias)
        # A cached prompt is not computed again, so nobody would score it.
        is_reused = ready.prefix_reuse and ask.sampling.prompt_logprobs is None
        prompts = [self._render(ask)] if ask.messages else ask.prompts
        return [
            self._encode(prompt, not ask.messages, ready.block_tokens if is_reused else 0, salt)
            for prompt in prompts
        ]

    def _render(self, ask: Ask) -> str:
        if self._template is None:
            raise BadRequest(
                f"{self.spec.name} has no chat template: use /v1/completions", param="messages"
            )
        return self._template.render(ask.messages)

    def _encode(
        self, prompt: str | list[int], add_special: bool, block_tokens: int, salt: bytes
    ) -> EncodedPrompt:
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special=add_special)
        if not prompt:
            raise BadRequest("prompt: is empty, expected at least one token", param="prompt")
        self._check_ids("prompt", prompt)
        data = np.asarray(prompt, dtype="<i4").tobytes()
        keys = prefix_keys(self.spec.name, data, block_tokens, salt) if block_tokens else ()
        return EncodedPrompt(prompt, text, data, keys)

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise BadRequest(
                f"{param}: found the token id {largest}, expected less than {self._vocab_size},"
                f" the vocabulary of {self.spec.name}",
                param=param,
            )

    def drafts(
        self, ask: Ask, prompt: EncodedPrompt, ready: ModelReady, arrived_s: float
    ) -> list[Draft]:
        """The n sequences of one prompt. Raises ContextOverflow."""
        timeout_s = self.spec.queue_timeout_s
        seed = getrandbits(SEED_BITS) if ask.seed is None else ask.seed
        max_tokens = self._max_tokens(ask, len(prompt.tokens), ready.max_model_len)
        return [
            Draft(
                model=self.spec.name,
                tokens=prompt.data,
                num_tokens=len(prompt.tokens),
                max_tokens=max_tokens,
                sampling=_for_choice(ask.sampling, seed, index),
                arrived_s=arrived_s,
                # Choices after the first start when it streams: they are not in time or late.
                deadline_s=arrived_s + timeout_s if timeout_s and not index else None,
                keys=prompt.keys,
                block_tokens=ready.block_tokens,
                path=self.spec.path,
            )
            for index in range(ask.n)
        ]

    def _max_tokens(self, ask: Ask, prompt_tokens: int, max_model_len: int) -> int:
        """How many tokens may come, if the context holds them."""
        room = max_model_len - prompt_tokens
        wanted = ask.max_tokens if ask.max_tokens is not None else max(1, ask.sampling.min_tokens)
        if wanted > room:
            raise ContextOverflow(
                f"{self.spec.name} holds {max_model_len} tokens; the prompt has {prompt_tokens}"
                f" and the answer may need {wanted}",
                param="messages" if ask.messages else "prompt",
            )
        return room if ask.max_tokens is None else wanted


def _for_choice(sampling: SamplingParams, seed: int, index: int) -> SamplingParams:
    """Each choice draws from numbers of its own."""
    return msgspec.structs.replace(sampling, seed=(seed + index) % (1 << SEED_BITS))
