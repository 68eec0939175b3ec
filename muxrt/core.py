"""The words of the brain: what is asked and generated, what a lane is told and what it answers.

Wire types are `msgspec.Struct`s: they round-trip through msgpack, so that a thread, a process or
a tensor-parallel rank can execute the same `Work`. The brain never looks into `Request.payload`.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf

import msgspec
import numpy as np
import numpy.typing as npt

BlockIds = npt.NDArray[np.int32]
ID_BYTES = 4  # of a block id on the wire: int32


class Phase(Enum):
    """The two phases of a sequence; a `MIXED` batch holds both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence or stop token
    LENGTH = "length"  # max_tokens or the model's maximum length
    ABORT = "abort"  # the client left
    DEADLINE = "deadline"  # its first token could not come in time
    ERROR = "error"  # its batch failed


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is drawn. Checked once, at the edge (server/openai.py)."""

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = {}
    seed: int = 0  # with the position it fixes the random number, whatever the batch
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # top alternatives per generated token; 0 = only the chosen one
    prompt_logprobs: int | None = None  # the same for every prompt token but the first


class Prompt(msgspec.Struct, frozen=True):
    """What `Request.payload` encodes (msgpack): read by the worker, opaque to the brain."""

    tokens: bytes  # int32, little endian
    sampling: SamplingParams
    num_outputs: int = 0  # of them, the last ones: generated before, in another unit

    def token_ids(self) -> BlockIds:
        """The prompt, and what was generated before. Shape [tokens], int32."""
        return np.frombuffer(self.tokens, dtype="<i4").astype(np.int32, copy=False)


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the K and V of a sequence, which a unit keeps for another one to fetch.

    It is a rectangle: layers `first_layer` to `end_layer` of whole groups from `first_group` on.
    """

    number: int  # in order, from 0; what was said before that one is void
    blocks: bytes  # of its groups, ids in that unit's arena, int32 little endian
    first_group: int = 0
    first_layer: int = 0
    end_layer: int
    num_tokens: int  # of the sequence, up to the end of its groups
    # Of the bytes of each kv head that the holder has: group after group, layer after layer. So
    # whoever takes some heads only can tell whether they are those that were sealed.
    checksums: tuple[int, ...] = ()
    is_last: bool = True  # nothing is missing after it


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where K and V of a sequence are to be fetched from."""

    unit: str  # name and generation: a unit that was started again holds nothing of before
    address: bytes  # how its memory is reached (worker/transfer.py); opaque to the brain
    num_tokens: int  # whose K and V it will have held in the end
    pieces: tuple[Piece, ...]  # those that can be fetched already
    is_whole: bool = True  # all of them can; otherwise the others are told of later
    attempt: int = 0  # what is said of this transfer names it
    wait_s: float = 0.0  # so long the next piece is waited for


class Request(msgspec.Struct, frozen=True):
    """What came in, as the brain sees it: lengths, keys and times, never text or tokens."""

    id: int
    model: str
    prompt_tokens: int
    max_tokens: int
    payload: bytes
    keys: tuple[bytes, ...] = ()  # chained hash keys of the prompt's full block groups
    arrived_s: float = 0.0  # monotonic clock of the machine
    deadline_s: float | None = None  # first token by then, or refuse (same clock)
    num_outputs: int = 0  # tokens that were generated before, in another unit; of `max_tokens`
    hold_s: float = 0.0  # after its last token its blocks are kept so long, to be fetched
    source: Source | None = None  # K and V of its tokens but the one to come; None = compute them

    @property
    def attempt(self) -> int:
        """Which attempt to fetch it this is; 0: it is none."""
        return self.source.attempt if self.source is not None else 0


class BlockGroup(msgspec.Struct, eq=False, gc=False):
    """The blocks that hold `block_tokens` tokens of one sequence (all layers, all kv heads).

    A struct, because many are made at once; it holds nothing that could refer back to it.
    """

    model: str
    blocks: bytes  # block ids, int32 little endian, layer-major planes inside
    refs: int = 1
    key: bytes | None = None  # set once its content is complete and may be reused

    @property
    def num_blocks(self) -> int:
        return len(self.blocks) // ID_BYTES


class SequenceState(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # holds no blocks; `num_committed` is 0
    RUNNING = "running"
    SWAPPING_OUT = "swapping_out"
    SWAPPED = "swapped"
    SWAPPING_IN = "swapping_in"
    FETCHING = "fetching"  # its K and V are on the way from another unit
    HELD = "held"  # it has all its tokens; its blocks wait to be fetched
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Outgoing:
    """How much of a sequence's K and V was given away, to be sealed, as it became final."""

    num_pieces: int = 0
    num_groups: int = 0  # in all their layers
    num_layers: int = 0  # of the groups behind those, as far as they are final
    unsealed: deque[Piece] = field(default_factory=deque)  # those to be launched next


@dataclass(slots=True, eq=False)
class Incoming:
    """How much of a sequence's K and V has come, from the unit that computes it or did."""

    pieces: list[Piece]
    is_whole: bool  # none will be added
    num_asked: int = 0  # whose fetch was launched
    is_asking: bool = False  # one is launched, or is going to be
    due_s: float = inf  # the next piece is waited for until then


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request's generation inside a unit.

    Tokens are counted, not stored: `num_scheduled` counts tokens whose K and V some launched work
    computes, `num_committed` those whose work is done. Outputs likewise. A step may be launched
    before the one before it is read, hence two counters of each.
    """

    request: Request
    order: int  # admission order in the unit; the newest is preempted first
    state: SequenceState = SequenceState.WAITING
    slot: int | None = None
    groups: list[BlockGroup] = field(default_factory=list)
    host_blocks: BlockIds | None = None  # where a swapped-out sequence's blocks lie
    num_cached: int = 0  # prompt tokens found in the prefix cache at the last (re)start
    num_scheduled: int = 0
    num_committed: int = 0
    outputs_scheduled: int = 0
    outputs_committed: int = 0
    in_flight: int = 0  # launched works that name this sequence
    lane: int = 0  # where they run; works in flight of one sequence share a lane (FIFO)
    num_groups_sent: int = 0  # groups the worker's block table already holds
    opened: bool = False  # the worker has the payload
    preempt: bool = False  # to be preempted as soon as no work is in flight
    num_preemptions: int = 0
    first_token_s: float | None = None  # when it was committed; TPOT counts from there
    outgoing: Outgoing | None = None  # its pieces are told of while it is computed
    incoming: Incoming | None = None  # its K and V come from another unit

    @property
    def num_tokens(self) -> int:
        """Tokens known to the worker once all launched work is done (prompt and outputs)."""
        return self.request.prompt_tokens + self.outputs_scheduled

    @property
    def num_pending(self) -> int:
        """Tokens whose K and V no launched work computes yet; 1 while decoding."""
        return self.num_tokens - self.num_scheduled

    @property
    def is_prefilled(self) -> bool:
        """Every token is scheduled but, once one was generated, the last of them."""
        return self.num_pending <= (self.outputs_scheduled > 0)

    @property
    def can_run(self) -> bool:
        """It holds its blocks and is not on its way out."""
        return self.state is SequenceState.RUNNING and not self.preempt


class SlotOpen(msgspec.Struct, frozen=True, array_like=True):
    """A slot of the model starts a new sequence; whatever it held before is forgotten."""

    slot: int
    payload: bytes  # msgpack of `Prompt`


class BatchEntry(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a batch: `num_tokens` tokens from position `start` on."""

    slot: int
    start: int  # tokens of the sequence already in the KV cache
    num_tokens: int
    samples: bool  # draw a token after the last one
    first_group: int = 0  # where in the slot's block table `blocks` go, in groups
    blocks: bytes = b""  # appended block ids, int32 little endian, whole groups


class Layers(msgspec.Struct, frozen=True, array_like=True):
    """A part of a forward pass: layers `begin` to `end` of `of`.

    The parts of a pass are launched one behind the other on the same lane, nothing between them.
    """

    begin: int
    end: int
    of: int

    @property
    def share(self) -> float:
        """In (0, 1]."""
        return (self.end - self.begin) / self.of


class Batch(msgspec.Struct, frozen=True, tag="batch"):
    """One forward pass of one model."""

    id: int
    lane: int
    model: str
    phase: Phase
    entries: tuple[BatchEntry, ...]
    opened: tuple[SlotOpen, ...] = ()
    layers: Layers | None = None  # only these of the forward pass; None = all of it

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)

    @property
    def ends_pass(self) -> bool:
        """After it, the forward pass is complete."""
        return self.layers is None or self.layers.end == self.layers.of

    @property
    def share(self) -> float:
        """Its part of the forward pass, in (0, 1]."""
        return self.layers.share if self.layers else 1.0


class CopyKind(Enum):
    """What a `Copy` moves."""

    SWAP_OUT = "swap_out"  # arena -> host
    SWAP_IN = "swap_in"  # host -> arena; the slot's block table becomes `blocks`


class Copy(msgspec.Struct, frozen=True, tag="copy"):
    """Move the blocks of one sequence between the arena and host memory."""

    id: int
    lane: int
    model: str
    kind: CopyKind
    slot: int
    blocks: bytes  # arena block ids, int32 little endian
    host_blocks: bytes  # host block ids, as many


class TransferKind(Enum):
    """What a `Transfer` does, seen from the unit that launches it."""

    SEAL = "seal"  # make the checksum of blocks that another unit is going to fetch
    FETCH = "fetch"  # another unit's blocks -> ours; the slot is opened


class Transfer(msgspec.Struct, frozen=True, tag="transfer"):
    """One unit's part in moving a sequence's K and V from unit to unit."""

    id: int
    lane: int
    model: str
    kind: TransferKind
    slot: int
    pieces: tuple[Piece, ...]  # SEAL: one, without checksums; FETCH: those that are to come
    blocks: bytes = b""  # FETCH: ids in our arena of the whole sequence, int32 little endian
    source: Source | None = None  # FETCH: who has the pieces
    opened: tuple[SlotOpen, ...] = ()  # FETCH: with the last piece


class Load(msgspec.Struct, frozen=True, tag="load"):
    """A model wakes: its weights come from host memory to where they are computed with.

    The blocks `first_block` to `end_block` of the arena give up their memory for them.
    """

    id: int
    lane: int
    model: str
    num_bytes: int  # of its weights
    first_block: int = 0
    end_block: int = 0


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """A model falls asleep: the memory of its weights is free from then on.

    Where it `makes_room`, a `Load` follows that takes that memory over; before it nobody else may.
    """

    id: int
    lane: int
    model: str
    num_bytes: int  # of its weights
    makes_room: bool = False


Scheduled = Batch | Copy | Transfer  # what names sequences
Work = Scheduled | Load | Sleep


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's own distribution (temperature 1)."""

    token: int
    logprob: float
    top_tokens: tuple[int, ...] = ()  # most probable first
    top_logprobs: tuple[float, ...] = ()


class Result(msgspec.Struct, frozen=True):
    """What one `Work` gave. All lists are by entry of the batch; empty for a copy."""

    tokens: tuple[int | None, ...] = ()  # None where the entry does not sample
    stopped: tuple[bool, ...] = ()  # the token ends its sequence (eos or a stop token)
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] | None = None
    elapsed_s: float = 0.0  # that its lane was taken, from when it could have begun
    error: str | None = None
    checksums: tuple[int, ...] = ()  # of a SEAL: `Piece.checksums`


class Refusal(msgspec.Struct, frozen=True):
    """Why a request was not served: an error of errors.py as data."""

    status: int
    kind: str
    message: str
    retry_after_s: float | None = None


class Output(msgspec.Struct, frozen=True, array_like=True):
    """What one step gave one request."""

    request_id: int
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # prompt chunk by prompt chunk
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    refusal: Refusal | None = None
    held: Piece | None = None  # it can be fetched from now on
    is_fetched: bool = False  # it was: the unit that held it may let go
    attempt: int = 0  # of a transfer, where it is about one: `Source.attempt`


def pack_ids(groups: list[BlockGroup]) -> bytes:
    """The block ids of `groups` in order, as the wire carries them."""
    return b"".join([group.blocks for group in groups])


def unpack_ids(ids: bytes) -> BlockIds:
    """Inverse of `pack_ids`. Shape [blocks], int32, read-only."""
    return np.frombuffer(ids, dtype=np.int32)
