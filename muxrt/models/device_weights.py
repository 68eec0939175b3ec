"""Weights on a device: fused, unpacked, and all of a model in one piece of memory.

One piece can be shared with other processes and given back as a whole.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from muxrt.config.model import ModelShape
from muxrt.config.shard import Shard
from muxrt.models.weights import (
    WHOLE,
    Checkpoint,
    Kind,
    Progress,
    State,
    TensorPlace,
    Weight,
    list_weights,
    part_rows,
)

ALIGNMENT = 256  # bytes: of every tensor's address, as cuBLAS's and TMA's fastest paths want it
INIT_STD = 0.02  # of random weights: initializer_range of published LLaMA configurations


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """The weights of one model: [rows, columns] as published, parts stacked; norms are float32.

    A rank of several has its rows and columns of them.
    """

    memory: Tensor  # [bytes] uint8 on the device
    places: Mapping[str, TensorPlace]
    bytes_read: int = 0  # of the files that they were loaded from

    @classmethod
    def reserve(
        cls, shape: ModelShape, dtype: torch.dtype, device: torch.device, shard: Shard = WHOLE
    ) -> "DeviceWeights":
        """Room for a rank's part of a model of this shape, not yet filled."""
        places = lay_out(shape, dtype, shard)
        size = max(place.offset + place.num_bytes for place in places.values())
        return cls(torch.empty(size, dtype=torch.uint8, device=device), places)

    def state(self) -> State:
        """The tensors by name, without a copy."""
        return {name: self._tensor(place) for name, place in self.places.items()}

    def _tensor(self, place: TensorPlace) -> Tensor:
        data = self.memory[place.offset : place.offset + place.num_bytes]
        return data.view(getattr(torch, place.dtype)).view(place.shape)


def lay_out(shape: ModelShape, dtype: torch.dtype, shard: Shard = WHOLE) -> dict[str, TensorPlace]:
    """Where each weight of a rank lies, in order of use; all but norms in `dtype`."""
    places, offset = {}, 0
    for weight in list_weights(shape, shard):
        is_norm = weight.kind is Kind.NORM and not weight.name.endswith(".bias")
        kept = torch.float32 if is_norm else dtype
        place = TensorPlace(str(kept).removeprefix("torch."), weight.shape, offset)
        places[weight.name] = place
        offset += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
    return places


def load_device_weights(
    folder: Path,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    shard: Shard = WHOLE,
) -> DeviceWeights:
    """A rank's weights of the model in `folder`, each published tensor straight from its file.

    Of tensors that are cut only what is held is read (`bytes_read`). The host holds no copy but the
    system's cache of the file; a dtype that differs is converted on the device. Raises ConfigError
    where a file or tensor is missing, damaged, or not of the shape that config.json promises.
    """
    listed = list(list_weights(shape, shard))
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        for weight in listed:
            checkpoint.check(weight)
        weights = DeviceWeights.reserve(shape, dtype, device, shard)
        state, done = weights.state(), 0
        total = sum(place.num_bytes for place in weights.places.values())
        for weight in listed:
            _fill(state[weight.name], weight, checkpoint)
            done += weights.places[weight.name].num_bytes
            if progress is not None:
                progress(done, total)
        return replace(weights, bytes_read=checkpoint.bytes_read)
    raise AssertionError("an exit stack swallows nothing")


def _fill(home: Tensor, weight: Weight, checkpoint: Checkpoint) -> None:
    for rows, published in zip(part_rows(weight, home), checkpoint.parts(weight), strict=True):
        is_same = published.dtype == rows.dtype
        rows.copy_(published if is_same else published.to(rows.device))


def random_device_weights(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> DeviceWeights:
    """Normal numbers made on the device, for benchmarks: speed does not depend on their values."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = DeviceWeights.reserve(shape, dtype, device)
    for name, tensor in weights.state().items():
        if name.endswith("norm"):
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, INIT_STD, generator=generator)
    return weights
