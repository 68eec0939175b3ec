"""Executes one `Work` on the caller's thread: the only place where messages become tensors."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muxrt import kernels
from muxrt.core import (
    ID_BYTES,
    Batch,
    BatchEntry,
    Copy,
    CopyKind,
    Layers,
    Load,
    Prompt,
    Result,
    Sleep,
    SlotOpen,
    TokenLogprobs,
    Transfer,
    Work,
    unpack_ids,
)
from muxrt.errors import MuxrtError
from muxrt.kernels import KvCache, MetaArrays, Team
from muxrt.models.llama import Llama, Session
from muxrt.models.ranks import Ranks
from muxrt.worker.host_weights import WeightMover
from muxrt.worker.kv_storage import SlotTable, Storage
from muxrt.worker.sampler import SLICE_ELEMS, Drawn, Sampling, describe
from muxrt.worker.transfer import Exchange

Ints = npt.NDArray[np.int64]
_PROMPTS = msgspec.msgpack.Decoder(Prompt)


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that is there to be run: weights, its view of the arena, its slots."""

    llama: Llama
    kv: KvCache
    slots: SlotTable
    sampling: Sampling

    @classmethod
    def of(cls, llama: Llama, model: str, storage: Storage) -> "Resident":
        """The model of that name in the unit whose memory `storage` is."""
        table = storage.slots[model]
        shape = llama.shape
        sampling = Sampling(len(table.tokens), shape.vocab_size, shape.eos_token_ids)
        return cls(llama, storage.kv_cache(model), table, sampling)


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch as arrays: S entries, T tokens."""

    slots: Ints  # [S]
    starts: Ints  # [S]
    bounds: Ints  # [S + 1]: prefix sums of tokens per entry
    owners: Ints  # [T]: the entry of each token
    positions: Ints  # [T]

    @classmethod
    def of(cls, entries: tuple[BatchEntry, ...]) -> "Layout":
        numbers = [(entry.slot, entry.start, entry.num_tokens) for entry in entries]
        slots, starts, counts = np.array(numbers, dtype=np.int64).T.copy()
        bounds = np.zeros(len(entries) + 1, dtype=np.int64)
        np.cumsum(counts, out=bounds[1:])
        if bounds[-1] == len(entries):  # one token each, as in every decode step
            return cls(slots, starts, bounds, np.arange(len(entries)), starts)
        owners = np.repeat(np.arange(len(entries)), counts)
        positions = np.arange(bounds[-1]) + (starts - bounds[:-1])[owners]
        return cls(slots, starts, bounds, owners, positions)

    def meta(self) -> MetaArrays:
        """What the kernels read."""
        return MetaArrays(self.slots, self.starts, self.bounds, self.positions, self.owners)


class Runner:
    """Runs the batches of a unit's models with one team of threads."""

    def __init__(
        self, models: Mapping[str, Resident], team: Team, ranks: Ranks | None = None
    ) -> None:
        """`ranks`: see `Session`. All run the same batches in order; the first one draws."""
        self._models = models
        self._team = team
        self._sessions = {
            name: Session(model.llama, model.kv, team, ranks) for name, model in models.items()
        }

    @torch.inference_mode()
    def run(self, batch: Work) -> Result:
        """One forward pass, or some layers of it: open slots, extend block tables, compute, draw.

        Raises MuxrtError where the layers before are missing: their part failed.
        """
        assert isinstance(batch, Batch), "copies have a lane of their own"
        begun_s = perf_counter()
        model, session = self._models[batch.model], self._sessions[batch.model]
        layout, num_layers = Layout.of(batch.entries), model.llama.shape.num_layers
        layers = batch.layers or Layers(0, num_layers, num_layers)
        if layers.begin == 0:
            _prepare(model, batch)
            tokens = model.slots.tokens[layout.slots[layout.owners], layout.positions]
            session.begin(tokens, layout.meta())
        elif session.next_layer != layers.begin:
            raise MuxrtError(f"layers {layers.begin} to {layers.end}: those before them failed")
        if layers.end < layers.of:
            session.go_on(layers.end)
            return Result(elapsed_s=perf_counter() - begun_s)
        # Of slots nothing is read behind the last exchange with other ranks but by the first one,
        # whose result lets others have them.
        spans = prompt_spans(layout, model.sampling, model.slots.unscored)
        hidden = session.go_on(layers.end)
        scored = _score_prompts(model, session, spans, hidden)
        drawn = self._sample(model, session, layout, batch.entries, hidden)
        return batch_result(batch.entries, drawn, scored, perf_counter() - begun_s)

    def learn(self, model: str, opened: Iterable[SlotOpen]) -> None:
        """Another lane opens these slots: their tokens are its to write, how to draw is for all."""
        for slot_open in opened:
            _learn(self._models[model], slot_open.slot, _PROMPTS.decode(slot_open.payload))

    def _sample(
        self,
        model: Resident,
        session: Session,
        layout: Layout,
        entries: tuple[BatchEntry, ...],
        hidden: Tensor,
    ) -> Drawn | None:
        """Draw a token after the last one of every entry that asks; None if none does.

        It goes into the slot's buffer, where the next batch finds it without waiting for us.
        """
        asking = np.array([entry.samples for entry in entries]).nonzero()[0]
        if not len(asking):
            return None
        rows = layout.bounds[asking + 1] - 1
        slots, positions = layout.slots[asking], layout.positions[rows] + 1
        if len(rows) < len(hidden):
            hidden = hidden[torch.from_numpy(rows)]
        logits, tokens = session.logits(hidden), model.slots.tokens
        if logits is None:
            return None
        drawn = model.sampling.draw(logits, slots, positions, tokens, self._team)
        tokens[slots, positions] = drawn.tokens
        return drawn


class Copier:
    """Moves blocks: between arena and host memory, and from other units' arenas into ours."""

    def __init__(
        self,
        storage: Storage,
        block_bytes: int,
        exchange: Exchange | None = None,
        models: Mapping[str, Resident] | None = None,
        mover: WeightMover | None = None,
    ) -> None:
        """`models` learn of slots that are opened here; lane processes learn by themselves.

        `mover` is for models that sleep.
        """
        self._mover = mover
        self._arena = storage.arena.tensor()
        self._host = storage.host.tensor()
        self._slots = storage.slots
        self._block_bytes = block_bytes
        self._exchange = exchange
        self._models = models or {}

    def run(self, work: Work) -> Result:
        """Swap one sequence out or in, or seal or fetch it; wake a model or let it sleep.

        When a sequence comes in, its slot's block table becomes `blocks`.
        """
        if isinstance(work, Transfer):
            return self._transfer(work)
        if isinstance(work, Load | Sleep):
            assert self._mover is not None, "the models of this unit are always awake"
            return self._mover.run(work)
        assert isinstance(work, Copy), "batches have lanes of their own"
        return self._copy(work)

    def _transfer(self, transfer: Transfer) -> Result:
        assert self._exchange is not None, "a unit without roles hands nothing over"
        slots = self._slots[transfer.model]
        for opened in transfer.opened:
            prompt = _PROMPTS.decode(opened.payload)
            slots.open(opened.slot, prompt.token_ids())
            if transfer.model in self._models:
                _learn(self._models[transfer.model], opened.slot, prompt)
        result = self._exchange.run(transfer)
        if transfer.opened:
            slots.append(transfer.slot, 0, unpack_ids(transfer.blocks))
        return result

    def _copy(self, copy: Copy) -> Result:
        begun_s = perf_counter()
        ids, host_ids = unpack_ids(copy.blocks), unpack_ids(copy.host_blocks)
        arena_side = (self._arena, torch.from_numpy(ids.copy()))
        host_side = (self._host, torch.from_numpy(host_ids.copy()))
        is_out = copy.kind is CopyKind.SWAP_OUT
        (src, src_ids), (dst, dst_ids) = (
            (arena_side, host_side) if is_out else (host_side, arena_side)
        )
        kernels.copy_blocks(src, dst, src_ids, dst_ids, self._block_bytes)
        if not is_out:
            self._slots[copy.model].append(copy.slot, 0, ids)
        return Result(elapsed_s=perf_counter() - begun_s)


def _prepare(model: Resident, batch: Batch) -> None:
    """Tell the slots what the batch brings: new sequences, and blocks."""
    for opened in batch.opened:
        _open(model, opened)
    for entry in batch.entries:
        if entry.blocks:
            model.slots.append(entry.slot, entry.first_group, unpack_ids(entry.blocks))


def _open(model: Resident, opened: SlotOpen) -> None:
    prompt = _PROMPTS.decode(opened.payload)
    model.slots.open(opened.slot, prompt.token_ids())
    _learn(model, opened.slot, prompt)


def _learn(model: Resident, slot: int, prompt: Prompt) -> None:
    """How the slot draws; what was generated before counts as generated."""
    num_tokens = len(prompt.tokens) // ID_BYTES
    model.sampling.open(slot, num_tokens - prompt.num_outputs, prompt.sampling)


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Tokens of a prompt whose logprobs were asked for, and which a batch predicts."""

    entry: int
    slot: int
    positions: slice  # of the tokens
    rows: slice  # of the batch, that predict them
    count: int  # of the most probable ones


def _score_prompts(
    model: Resident, session: Session, spans: list[PromptSpan] | None, hidden: Tensor
) -> dict[int, tuple[TokenLogprobs, ...]] | None:
    """Logprobs of the prompt tokens that this batch predicts, by entry; None if none asked."""
    if spans is None:
        return None
    scored = {}
    for span in spans:
        known = model.slots.tokens[span.slot, span.positions].tolist()
        scored[span.entry] = tuple(_score(session, hidden[span.rows], known, span.count))
    return scored


def prompt_spans(
    layout: Layout, sampling: Sampling, unscored: npt.NDArray[np.int32]
) -> list[PromptSpan] | None:
    """What is to be scored of a batch, each token once: `unscored` moves on. None if none asked."""
    params = sampling.params[layout.slots]
    asking = np.flatnonzero(params["prompt_logprobs"] >= 0).tolist()
    spans = []
    for entry in asking:
        slot, begin = int(layout.slots[entry]), int(layout.bounds[entry])
        start, tokens = int(layout.starts[entry]), int(layout.bounds[entry + 1]) - begin
        # The row of position p predicts the token at p + 1.
        first = max(start + 1, int(unscored[slot]))
        end = min(start + tokens + 1, int(params["prompt_tokens"][entry]))
        if first < end:
            rows = slice(begin + first - 1 - start, begin + end - 1 - start)
            count = int(params["prompt_logprobs"][entry])
            spans.append(PromptSpan(entry, slot, slice(first, end), rows, count))
            unscored[slot] = end
    return spans if asking else None


def _score(
    session: Session, hidden: Tensor, tokens: list[int], count: int
) -> Iterator[TokenLogprobs]:
    """Logprobs of `tokens[i]` after `hidden[i]`, a slice of the vocabulary's rows at a time."""
    step = max(1, SLICE_ELEMS // session.vocab_size)
    for begin in range(0, len(tokens), step):
        part = tokens[begin : begin + step]
        logits = session.logits(hidden[begin : begin + step])
        if logits is not None:
            yield from describe(logits.log_softmax(dim=-1), part, [count] * len(part))


def batch_result(
    entries: tuple[BatchEntry, ...],
    drawn: Drawn | None,
    scored: dict[int, tuple[TokenLogprobs, ...]] | None,
    elapsed_s: float,
) -> Result:
    """What the batch gave, by entry."""
    prompts = None
    if scored is not None:
        prompts = tuple(scored.get(index, ()) for index in range(len(entries)))
    if drawn is None:
        nothing = (None,) * len(entries)
        return Result(nothing, (False,) * len(entries), None, prompts, elapsed_s)
    rows = iter(range(len(drawn.tokens)))
    index = [next(rows) if entry.samples else None for entry in entries]
    logprobs = None
    if drawn.logprobs is not None:
        logprobs = tuple(None if i is None else drawn.logprobs[i] for i in index)
    return Result(
        tokens=tuple(None if i is None else drawn.tokens[i] for i in index),
        stopped=tuple(i is not None and drawn.stopped[i] for i in index),
        logprobs=logprobs,
        prompt_logprobs=prompts,
        elapsed_s=elapsed_s,
    )
