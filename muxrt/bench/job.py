"""What is sent where, and what the client saw come back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from muxrt.metrics import Timing, tpot_s


class Api(Enum):
    """Which of the two OpenAI routes generates."""

    COMPLETIONS = "completions"
    CHAT = "chat"


class Status(Enum):
    """What became of a request."""

    OK = "ok"
    REFUSED = "refused"  # 429: the server said that it is full
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Target:
    """The endpoint and how it is asked."""

    url: str  # as users know it, with or without /v1
    api_key: str | None = None
    api: Api = Api.COMPLETIONS
    ignore_eos: bool = True  # vLLM's and muxrt's extension: exactly max_tokens come back
    timeout_s: float = 600.0  # of one request

    @property
    def root(self) -> str:
        """The address without `/v1`: where /metrics is."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def route(self) -> str:
        path = "completions" if self.api is Api.COMPLETIONS else "chat/completions"
        return f"{self.root}/v1/{path}"

    @property
    def headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", **key}


@dataclass(frozen=True, slots=True)
class Job:
    """A request to be sent `at_s` seconds after the start."""

    at_s: float
    model: str
    prompt: str | list[int]  # text, or token ids
    max_tokens: int


@dataclass(slots=True)
class Outcome:
    """What the client saw; times count from when the request was due, not from when it left."""

    model: str
    due_s: float
    status: Status = Status.FAILED
    lag_s: float = 0.0  # how late the client itself was
    ttft_s: float | None = None
    last_s: float | None = None
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def timing(self) -> Timing:
        """TTFT and TPOT as `muxrt.metrics` takes them."""
        if self.ttft_s is None or self.last_s is None:
            return Timing(self.ttft_s, None)
        return Timing(self.ttft_s, tpot_s(self.ttft_s, self.last_s, self.output_tokens))


@dataclass(slots=True)
class Progress:
    """Counts while a replay runs; `changed` is called after each change."""

    total: int
    changed: Callable[["Progress"], None] = lambda _: None
    sent: int = 0
    done: int = 0
    counts: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))

    def on_sent(self) -> None:
        self.sent += 1
        self.changed(self)

    def on_done(self, outcome: Outcome) -> None:
        self.done += 1
        self.counts[outcome.status] += 1
        self.changed(self)
