"""Launches one `Work` on the device: the only place where messages become tensors there.

Nothing waits. What a batch draws goes into the slots' tokens on the device, where the next batch
finds it; the host reads a copy when the batch is over, by which time it has launched others.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from muxrt.core import (
    Batch,
    Copy,
    CopyKind,
    Prompt,
    Result,
    SlotOpen,
    TokenLogprobs,
    Work,
    unpack_ids,
)
from muxrt.kernels import KvCache, gpu
from muxrt.models.device_llama import DeviceLlama, DeviceSession, rope_table
from muxrt.models.ranks import Ranks
from muxrt.worker.device_sampler import edit_row
from muxrt.worker.device_storage import Blocks, DeviceSlots, DeviceStorage, upload
from muxrt.worker.flight import Flight, Share, Span
from muxrt.worker.graphs import Key, Steps, batch_bucket, context_bucket
from muxrt.worker.inputs import Inputs, Sizes, download
from muxrt.worker.runner import Ints, Layout, PromptSpan, batch_result, prompt_spans
from muxrt.worker.sampler import (
    EDITS,
    LOGPROBS,
    SLICE_ELEMS,
    BadLogits,
    Drawn,
    Sampling,
    TopScores,
    spread,
)

_PROMPTS = msgspec.msgpack.Decoder(Prompt)

Choose = Callable[[], Share]


@dataclass(frozen=True, slots=True)
class DeviceResident:
    """A model that is there to be run: weights, its view of the arena, its slots."""

    llama: DeviceLlama
    kv: KvCache
    rope: tuple[Tensor, Tensor]
    slots: DeviceSlots
    sampling: Sampling

    @classmethod
    def of(cls, llama: DeviceLlama, model: str, storage: DeviceStorage) -> "DeviceResident":
        """The model of that name in the unit whose memory `storage` is."""
        slots, shape = storage.slots[model], llama.shape
        sampling = Sampling(slots.scratch, shape.vocab_size, shape.eos_token_ids)
        rope = rope_table(shape, slots.tokens.shape[1], storage.device)
        # Tables and weights were made on the default stream, for which lanes' streams do not wait.
        torch.get_device_module(storage.device).synchronize()
        return cls(llama, storage.kv_cache(model), rope, slots, sampling)

    def session(self, sm_count: int, ranks: Ranks | None = None) -> DeviceSession:
        """For a share of that many SMs; `ranks`: see `DeviceSession`."""
        return DeviceSession(self.llama, self.kv, self.rope, sm_count, ranks)


class DecodeStep:
    """One token of each sequence, from the slots' tokens to the drawn ones; see `Steps`."""

    def __init__(self, model: DeviceResident, key: Key, sm_count: int, ranks: Ranks | None) -> None:
        device = model.slots.tokens.device
        self.inputs = Inputs(Sizes(key.sequences, key.sequences, key.sequences), device)
        self.drawn = torch.zeros(key.sequences, dtype=torch.int64, device=device)
        self._model = model
        self._session = model.session(sm_count, ranks)
        self._workspace = self._session.workspace(key.sequences, key.tokens)

    def run(self) -> None:
        meta, slots = self.inputs.meta, self._model.slots
        tokens = slots.tokens[meta.slots.long(), meta.positions.long()]
        hidden = self._session.forward(tokens, meta, self._workspace)
        logits = self._session.logits(hidden)
        if logits is not None:
            draw(logits, self.inputs, self.drawn)
            keep(slots, self.inputs, self.drawn)


def draw(logits: Tensor, inputs: Inputs, out: Tensor) -> None:
    """The tokens that `inputs` asks for; -1 where logits are not finite. logits, out [draws]."""
    asked = inputs.draws
    how = (asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.seeds)
    gpu.sample(logits, *how, asked.positions, out)


def keep(slots: DeviceSlots, inputs: Inputs, drawn: Tensor) -> None:
    """Put drawn tokens where the next batch looks for them."""
    places = (inputs.draws.slots.long(), inputs.draws.positions.long())
    slots.tokens.index_put_(places, drawn.clamp(min=0).int())


class DeviceRunner:
    """Launches the batches of a unit's models for one lane; its thread's alone."""

    def __init__(
        self,
        models: Mapping[str, DeviceResident],
        steps: Steps,
        choose: Choose,
        ranks: Ranks | None = None,
    ) -> None:
        """`choose` says which share of the device the next batch gets.

        `ranks`: see `DeviceSession`. All run the same batches in order, on shares of the same
        names; the first one draws, and the results of the others say nothing.
        """
        self._models = models
        self._steps = steps
        self._choose = choose
        self._ranks = ranks
        self._last: tuple[Share, Any] | None = None

    def learn(self, model: str, opened: Iterable[SlotOpen]) -> None:
        """Another process opens these slots: their tokens are its to write, how to draw is ours."""
        for slot_open in opened:
            prompt = _PROMPTS.decode(slot_open.payload)
            num_tokens = len(prompt.tokens) // 4
            self._models[model].sampling.open(slot_open.slot, num_tokens, prompt.sampling)

    @torch.inference_mode()
    def launch(self, batch: Work) -> Flight:
        """One forward pass: open slots, extend block tables, compute, draw."""
        assert isinstance(batch, Batch) and batch.layers is None, "whole passes: no roles on a GPU"
        model, share = self._models[batch.model], self._choose()
        device = model.slots.tokens.device
        with torch.get_device_module(device).stream(share.stream):
            if self._last is not None and self._last[0] is not share:
                self._last[1].wait()  # a lane's works are done in order, whatever their share
            span = Span(device)
            _open(model, batch)
            read = self._launch(model, share, batch, span)
            span.end()
        self._last = (share, span.over)
        return Flight(span, read)

    def _launch(
        self, model: DeviceResident, share: Share, batch: Batch, span: Span
    ) -> Callable[[float], Result]:
        layout = Layout.of(batch.entries)
        asking = np.array([entry.samples for entry in batch.entries]).nonzero()[0]
        params = model.sampling.params[layout.slots]
        is_plain = not (params["needs"] & (EDITS | LOGPROBS)).any()
        is_plain &= bool((params["prompt_logprobs"] < 0).all())
        if is_plain and len(asking) == len(layout.positions):
            return self._decode(model, share, batch, layout, span)
        session = model.session(share.sm_count, self._ranks)
        return _run_whole(model, session, batch, layout, asking)

    def _decode(
        self, model: DeviceResident, share: Share, batch: Batch, layout: Layout, span: Span
    ) -> Callable[[float], Result]:
        """One token of each sequence, and nothing but tokens to report: a step that is kept."""
        sequences = batch_bucket(len(layout.slots))
        longest = int(layout.positions.max()) + 1
        key = Key(batch.model, share.name, sequences, context_bucket(longest))
        step = self._steps.get(key, lambda: DecodeStep(model, key, share.sm_count, self._ranks))
        assert isinstance(step, DecodeStep)
        step.inputs.copy_from(
            _filled(model, layout, np.arange(len(layout.slots)), step.inputs.sizes)
        )
        if self._steps.prepare(key):
            span.begin()
        graph = self._steps.launch(key)
        tokens, stops = download(step.drawn), model.sampling.stops(layout.slots)

        def read(seconds: float) -> Result:
            nonlocal graph
            graph = None  # until now the device may have been replaying it
            drawn = read_tokens(tokens[: len(stops)], stops)
            return batch_result(batch.entries, drawn, None, seconds)

        return read


def _open(model: DeviceResident, batch: Batch) -> None:
    for opened in batch.opened:
        prompt = _PROMPTS.decode(opened.payload)
        tokens = prompt.token_ids()
        model.slots.open(opened.slot, tokens)
        model.sampling.open(opened.slot, len(tokens), prompt.sampling)
    model.slots.append(
        Blocks(entry.slot, entry.first_group, unpack_ids(entry.blocks)) for entry in batch.entries
    )


def _filled(model: DeviceResident, layout: Layout, asking: Ints, sizes: Sizes) -> Inputs:
    """The batch in the host's memory."""
    is_cuda = model.slots.tokens.device.type == "cuda"
    host = Inputs(sizes, torch.device("cpu"), is_pinned=is_cuda)
    params = model.sampling.params[layout.slots[asking]]
    host.fill(layout, asking, params, model.slots.scratch)
    return host


def read_tokens(tokens: Tensor, stops: list[frozenset[int]]) -> Drawn:
    """Tokens in the host's memory as what the client gets. Raises BadLogits."""
    chosen: list[int] = tokens.tolist()
    if chosen and min(chosen) < 0:
        raise BadLogits("the model's logits are not finite")
    stopped = [token in ends for token, ends in zip(chosen, stops, strict=True)]
    return Drawn(chosen, stopped, None)


def _run_whole(
    model: DeviceResident, session: DeviceSession, batch: Batch, layout: Layout, asking: Ints
) -> Callable[[float], Result]:
    """Any batch, of its own size: prompts, chunks, penalties, logprobs."""
    slots, device = model.slots, model.slots.tokens.device
    # Of slots nothing is read behind the last exchange with other ranks but by the first one, whose
    # result lets others have them.
    spans = prompt_spans(layout, model.sampling, slots.unscored)
    inputs = Inputs(Sizes.of(layout, len(asking)), device)
    inputs.copy_from(_filled(model, layout, asking, inputs.sizes))
    meta = inputs.meta
    owners = meta.slots[meta.token_sequence.long()]
    tokens = slots.tokens[owners.long(), meta.positions.long()]
    hidden = session.forward(tokens, meta)
    scored = _score_prompts(model, session, spans, hidden)
    drawn = _draw(model, session, inputs, layout, asking, hidden) if len(asking) else None

    def read(seconds: float) -> Result:
        return batch_result(
            batch.entries, drawn and drawn(), None if scored is None else scored(), seconds
        )

    return read


def _draw(
    model: DeviceResident,
    session: DeviceSession,
    inputs: Inputs,
    layout: Layout,
    asking: Ints,
    hidden: Tensor,
) -> Callable[[], Drawn] | None:
    """Draw after the last row of every entry that asks; how to read it later.

    None on ranks other than the first.
    """
    rows = layout.bounds[asking + 1] - 1
    slots, positions = layout.slots[asking], layout.positions[rows] + 1
    params = model.sampling.params[slots]
    logits = session.logits(hidden[inputs.draws.rows.long()])
    if logits is None:
        return None
    wanted = np.flatnonzero(params["needs"] & LOGPROBS)
    scores = logits[upload(wanted, logits.device)].log_softmax(dim=-1) if len(wanted) else None
    for row, edits in model.sampling.edits(slots).items():
        history = model.slots.tokens[int(slots[row]), : int(positions[row])]
        edit_row(logits[row], edits, history, int(params["prompt_tokens"][row]))
    drawn = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    draw(logits, inputs, drawn)
    keep(model.slots, inputs, drawn)
    tokens, stops = download(drawn), model.sampling.stops(slots)
    if scores is None:
        return lambda: read_tokens(tokens, stops)
    counts = params["logprobs"][wanted].tolist()
    chosen = drawn.clamp(min=0)[upload(wanted, logits.device)]
    top = _download(TopScores.of(scores, chosen, max(counts)))

    def read() -> Drawn:
        found = read_tokens(tokens, stops)
        logprobs = spread(top.read(counts), wanted, len(found.tokens))
        return Drawn(found.tokens, found.stopped, logprobs)

    return read


def _score_prompts(
    model: DeviceResident, session: DeviceSession, spans: list[PromptSpan] | None, hidden: Tensor
) -> Callable[[], dict[int, tuple[TokenLogprobs, ...]]] | None:
    """Logprobs of the prompt tokens that this batch predicts, by entry; None if none asked."""
    if spans is None:
        return None
    step = max(1, SLICE_ELEMS // session.llama.shape.vocab_size)
    parts: list[tuple[int, TopScores, int]] = []
    for span in spans:
        known = model.slots.tokens[span.slot, span.positions]
        for rows, tokens in zip(hidden[span.rows].split(step), known.split(step), strict=True):
            logits = session.logits(rows)
            if logits is not None:
                top = _download(TopScores.of(logits.log_softmax(dim=-1), tokens, span.count))
                parts.append((span.entry, top, span.count))

    def read() -> dict[int, tuple[TokenLogprobs, ...]]:
        scored: dict[int, tuple[TokenLogprobs, ...]] = {}
        for entry, top, count in parts:
            found = top.read([count] * len(top.tokens))
            scored[entry] = scored.get(entry, ()) + tuple(found)
        return scored

    return read


def _download(top: TopScores) -> TopScores:
    return TopScores(*(download(column) for column in top))


class DeviceCopier:
    """Moves blocks between arena and host memory, on a stream of its own."""

    def __init__(
        self,
        storage: DeviceStorage,
        block_bytes: int,
        share: Share,
        ranks: Ranks | None = None,
    ) -> None:
        """Of several `ranks` each moves its planes: it is over when it is over on all."""
        self._ranks = ranks
        self._storage = storage
        self._block_bytes = block_bytes
        self._share = share

    @torch.inference_mode()
    def launch(self, copy: Work) -> Flight:
        """Swap one sequence out or in; coming in, its slot's block table becomes `blocks`."""
        assert isinstance(copy, Copy), "batches have lanes of their own"
        device = self._storage.device
        with torch.get_device_module(device).stream(self._share.stream):
            span = Span(device)
            ids = unpack_ids(copy.blocks)
            arena_side = (self._storage.arena, upload(ids, device))
            host_side = (self._storage.host, upload(unpack_ids(copy.host_blocks), device))
            is_out = copy.kind is CopyKind.SWAP_OUT
            (src, src_ids), (dst, dst_ids) = (
                (arena_side, host_side) if is_out else (host_side, arena_side)
            )
            gpu.copy_blocks(src, dst, src_ids, dst_ids, self._block_bytes)
            if not is_out:
                self._storage.slots[copy.model].append([Blocks(copy.slot, 0, ids)])
            if self._ranks is not None:
                self._ranks.add(torch.zeros(1, device=device))  # behind the copies of all
            span.end()
        return Flight(span, lambda seconds: Result(elapsed_s=seconds))
