"""What a step costs: the protocol of the planner's cost models."""

from typing import Protocol


class Steps(Protocol):
    """Step times of one model on a mesh, at one share of its SMs. More work is never faster."""

    def prefill_s(self, tokens: float, squares: float) -> float:
        """Seconds for prompts of `tokens` tokens in all; `squares` = sum of their lengths squared.

        From position 0 on, a prompt's tokens attend to half of its length squared.
        """

    def mean_prefill_s(self, tokens: float, squares: float) -> float:
        """The same for prompts of different lengths, with these means.

        It differs from `prefill_s` where kernels compute whole tiles of tokens.
        """

    def decode_s(self, batch: float, context: float) -> float:
        """Seconds for a token each of `batch` sequences that hold `context` tokens in all."""


class SharedSteps(Protocol):
    """Step times of one model on a mesh, by compute share."""

    @property
    def source(self) -> str:
        """Where the times come from: a profile's title, or "roofline"."""

    def at(self, share: float) -> Steps:
        """The times at `share` of the SMs or cores, in (0, 1].

        A larger share of a GPU is never slower; of a CPU it may be, as it was measured.
        """
