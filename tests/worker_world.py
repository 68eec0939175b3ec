"""Two tiny random models in one arena, and a desk that drives an executor as the brain would."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers

from muxrt.config.model import load_shape
from muxrt.config.placement import Lanes, Memory, Mesh, ModelSpec, Scheduling, UnitModel, UnitSpec
from muxrt.core import (
    Batch,
    BatchEntry,
    Copy,
    CopyKind,
    Phase,
    Prompt,
    Result,
    SamplingParams,
    SlotOpen,
    Work,
)
from muxrt.engine.build import UnitPlan, plan_unit
from muxrt.models.llama import Llama

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
MAX_LEN = 96
CORES = sorted(os.sched_getaffinity(0))

# By name: grouped heads of 64, and a narrow one of 128 with tied embeddings.
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "narrow": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}
LAYERS = {"wide": 3, "narrow": 2}
VOCAB = {"wide": 199, "narrow": 151}


def write_models(home: Path) -> None:
    """Random weights, large enough that greedy text wanders."""
    for name, shape in SHAPES.items():
        torch.manual_seed(len(name))
        config = transformers.LlamaConfig(
            intermediate_size=128,
            num_hidden_layers=LAYERS[name],
            vocab_size=VOCAB[name],
            max_position_embeddings=MAX_LEN,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=[1, 2],
            pad_token_id=None,
            **shape,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(home / name)


def make_plan(
    home: Path,
    planes_per_block: int = 1,
    lanes: Lanes | None = None,
    kv_bytes: int = 4 << 20,
    dtype: str = "float32",
    kv_dtype: str = "auto",
    graph_bytes: int = 0,
    tp: int = 1,
    **scheduling: Any,
) -> UnitPlan:
    """A unit with both models; 8 and 4 tokens per block group."""
    spec = UnitSpec(
        name="unit",
        models=tuple(UnitModel(name=name) for name in SHAPES),
        memory=Memory(
            kv_bytes=kv_bytes,
            swap_bytes=kv_bytes,
            graph_bytes=graph_bytes,
            planes_per_block=planes_per_block,
            plane_tokens=4,
        ),
        mesh=Mesh(gpus=tuple(range(tp))),
        lanes=lanes or Lanes(),
        scheduling=Scheduling(max_sequences=16, **scheduling),
    )
    models = {
        name: ModelSpec(name=name, path=str(home / name), dtype=dtype, kv_dtype=kv_dtype)  # type: ignore[arg-type]
        for name in SHAPES
    }
    return plan_unit(spec, models, {name: load_shape(home / name) for name in SHAPES})


def load_models(home: Path, dtype: Any = "float32") -> dict[str, Llama]:
    return {name: Llama.load(home / name, dtype) for name in SHAPES}


class Reference:
    """The same models in `transformers`."""

    def __init__(self, home: Path) -> None:
        self._models = {
            name: transformers.AutoModelForCausalLM.from_pretrained(
                home / name, dtype=torch.float32
            ).eval()
            for name in SHAPES
        }

    @torch.inference_mode()
    def logits(self, model: str, tokens: Sequence[int]) -> torch.Tensor:
        """[tokens, vocab]"""
        return self._models[model](torch.tensor([list(tokens)])).logits[0]

    def check_greedy(self, model: str, prompt: list[int], outputs: list[int]) -> None:
        """Every output is the reference's best after all before it, or within 1e-3 of it."""
        logits = self.logits(model, prompt + outputs)[len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits[torch.arange(len(outputs)), torch.tensor(outputs)]
        assert float(behind.max()) < 1e-3, (model, behind)


@dataclass(eq=False)
class Seat:
    """A sequence at the desk."""

    model: str
    slot: int
    prompt: list[int]
    sampling: SamplingParams = GREEDY
    outputs: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    stopped: list[bool] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)
    scheduled: int = 0
    outputs_scheduled: int = 0
    groups_sent: int = 0
    opened: bool = False

    @property
    def pending(self) -> int:
        return len(self.prompt) + self.outputs_scheduled - self.scheduled


class Desk:
    """Makes works with random block ids, and notes what they gave."""

    def __init__(self, plan: UnitPlan, seed: int = 0) -> None:
        self.plan = plan
        self.rng = np.random.default_rng(seed)
        self.free = self.rng.permutation(plan.num_blocks).tolist()
        self.host_free = self.rng.permutation(plan.num_host_blocks).tolist()
        self.copy_lane = len(plan.spec.lanes.split or (1,))
        self._slots = {name: self.rng.permutation(16).tolist() for name in SHAPES}
        self._ids = 0
        self._parts: dict[int, list[Seat]] = {}

    def seat(self, model: str, prompt_tokens: int, sampling: SamplingParams = GREEDY) -> Seat:
        prompt = self.rng.integers(3, VOCAB[model], prompt_tokens).tolist()
        return Seat(model, self._slots[model].pop(), prompt, sampling)

    def batch(self, lane: int, parts: Sequence[tuple[Seat, int]]) -> Batch:
        """One forward pass over `tokens` of each seat."""
        opened = tuple(self._open(seat) for seat, _ in parts if not seat.opened)
        entries = tuple(self._entry(seat, tokens) for seat, tokens in parts)
        return Batch(self._id(parts), lane, parts[0][0].model, Phase.MIXED, entries, opened)

    def decode(self, lane: int, *seats: Seat) -> Batch:
        return self.batch(lane, [(seat, 1) for seat in seats])

    def swap_out(self, seat: Seat) -> Copy:
        seat.host_blocks = [self.host_free.pop() for _ in seat.blocks]
        copy = self._copy(seat, CopyKind.SWAP_OUT)
        self.free += seat.blocks
        self.rng.shuffle(self.free)
        return copy

    def swap_in(self, seat: Seat) -> Copy:
        seat.blocks = [self.free.pop() for _ in seat.host_blocks]
        return self._copy(seat, CopyKind.SWAP_IN)

    def recompute(self, seat: Seat) -> None:
        """Preempted: its blocks are gone, its tokens are not."""
        self.free += seat.blocks
        self.rng.shuffle(self.free)
        seat.blocks, seat.scheduled, seat.groups_sent = [], 0, 0

    def leave(self, seat: Seat) -> None:
        self.recompute(seat)
        self._slots[seat.model].append(seat.slot)

    def note(self, work: Work, result: Result) -> None:
        """`done` of an executor."""
        assert result.error is None, result.error
        if not isinstance(work, Batch):
            return
        for index, (seat, entry) in enumerate(
            zip(self._parts.pop(work.id), work.entries, strict=True)
        ):
            token = result.tokens[index]
            assert (token is not None) == entry.samples
            if token is not None:
                seat.outputs.append(token)
                seat.stopped.append(result.stopped[index])
                seat.logprobs.append(result.logprobs[index] if result.logprobs else None)
            if result.prompt_logprobs is not None:
                seat.prompt_logprobs += result.prompt_logprobs[index]

    def _id(self, parts: Sequence[tuple[Seat, int]]) -> int:
        self._ids += 1
        self._parts[self._ids] = [seat for seat, _ in parts]
        return self._ids

    def _open(self, seat: Seat) -> SlotOpen:
        seat.opened = True
        prompt = Prompt(np.array(seat.prompt, dtype="<i4").tobytes(), seat.sampling)
        return SlotOpen(seat.slot, msgspec.msgpack.encode(prompt))

    def _entry(self, seat: Seat, tokens: int) -> BatchEntry:
        layout = self.plan.models[seat.model].layout
        start, samples = seat.scheduled, tokens == seat.pending
        seat.scheduled += tokens
        seat.outputs_scheduled += samples
        missing = layout.num_blocks(seat.scheduled) - len(seat.blocks)
        new = [self.free.pop() for _ in range(missing)]
        seat.blocks += new
        first, seat.groups_sent = seat.groups_sent, layout.num_groups(seat.scheduled)
        return BatchEntry(seat.slot, start, tokens, samples, first, _pack(new))

    def _copy(self, seat: Seat, kind: CopyKind) -> Copy:
        host = _pack(seat.host_blocks)
        work_id = self._id([(seat, 0)])
        return Copy(work_id, self.copy_lane, seat.model, kind, seat.slot, _pack(seat.blocks), host)


def _pack(ids: list[int]) -> bytes:
    return np.array(ids, dtype=np.int32).tobytes()
