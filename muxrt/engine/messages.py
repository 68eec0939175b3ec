"""What the API process and the unit processes say to each other (msgpack over ZeroMQ)."""

import msgspec

from muxrt.config.placement import ModelSpec, UnitSpec
from muxrt.core import Output, Phase, Piece, Request


class UnitBoot(msgspec.Struct, frozen=True, kw_only=True):
    """All that a unit process is told at its start: JSON, the first line of its stdin.

    Stdin stays open while the API process lives. Its end means that the API is gone, however it
    died: the unit exits at once, so that nobody serves for nobody.
    """

    unit: UnitSpec
    models: tuple[ModelSpec, ...]  # of this unit only; paths are absolute
    endpoint: str  # ZeroMQ address to connect a DEALER to
    identity: str  # the DEALER's routing id: unit name and generation


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """API -> unit: serve this request. Refusals come back as an `Output` with a `refusal`."""

    request: Request


class Extend(msgspec.Struct, frozen=True, tag="extend"):
    """API -> unit: more of a request's K and V, which it fetches, is there.

    With the last piece comes the payload to go on with: it ends in `num_outputs` tokens more.
    """

    request_id: int
    piece: Piece
    payload: bytes = b""
    num_outputs: int = 0


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """API -> unit: the client left (or a stop string was found); free everything of it."""

    request_id: int


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """API -> unit: finish what runs, take nothing new, exit when idle or after `deadline_s`."""

    deadline_s: float


class SetAwake(msgspec.Struct, frozen=True, tag="set_awake"):
    """API -> unit: wake a model, or put it to sleep. `Stats` say what came of it."""

    model: str
    is_awake: bool


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """API -> unit: nobody will ask for this model again; it sleeps for good, pinned or not."""

    model: str


ToUnit = Submit | Extend | Abort | Drain | SetAwake | Forget


class ModelReady(msgspec.Struct, frozen=True):
    """What the API must know of a model that a unit serves."""

    name: str
    block_tokens: int  # tokens per block group: the granularity of prefix keys
    max_model_len: int  # prompt + output tokens a sequence may have (KV entitlement included)
    quota_blocks: int
    blocks_per_group: int
    prefix_reuse: bool = True
    is_made_up: bool = False  # its tokens come from a null executor, not from the model
    address: bytes = b""  # how other units reach its K and V (worker/transfer.py)
    may_sleep: bool = False  # its unit has a budget for weights


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """unit -> API: progress while weights load and kernels compile."""

    unit: str
    stage: str  # "weights", "warm-up"
    model: str | None
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """unit -> API: every model of the unit answers from now on."""

    unit: str
    pid: int
    models: tuple[ModelReady, ...]
    num_blocks: int
    block_bytes: int


class Step(msgspec.Struct, frozen=True, tag="step"):
    """unit -> API: the outputs of one step (or of refusals, aborts), all requests together."""

    outputs: tuple[Output, ...]


class ModelStats(msgspec.Struct, frozen=True):
    """Gauges and counters of one model in one unit; counters only grow while the unit lives."""

    model: str
    waiting: int
    running: int
    preempted: int  # started, hold no blocks now: swapped out or to be recomputed
    blocks_used: int  # held by sequences; what the prefix cache alone keeps is `blocks_cached`
    blocks_cached: int
    blocks_quota: int
    blocks_borrowed: int
    preemptions_swap: int
    preemptions_recompute: int
    prefix_hit_tokens: int
    prompt_tokens: int
    output_tokens: int
    refused: int  # at their deadline
    state: str = "awake"  # of its weights: `sched.residency.State`
    moves: int = 0  # times that it woke or fell asleep


class BatchStats(msgspec.Struct, frozen=True):
    """Batches of one model and phase that a unit computed since it lives."""

    model: str
    phase: Phase
    batches: int = 0
    tokens: int = 0  # that went in
    seconds: float = 0.0  # on the lanes: two that ran side by side for a second took two


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """unit -> API, about once a second while anything changes, and once when it goes idle."""

    unit: str
    blocks_total: int
    blocks_free: int
    models: tuple[ModelStats, ...]
    batches: tuple[BatchStats, ...] = ()


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """unit -> API: it cannot serve; the process exits with 1 after this."""

    unit: str
    message: str  # one line for people: what is wrong and what to do


class Stopped(msgspec.Struct, frozen=True, tag="stopped"):
    """unit -> API: drained; the process exits with 0 after this."""

    unit: str


FromUnit = Loading | Ready | Step | Stats | Failed | Stopped
