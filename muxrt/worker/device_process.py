"""A lane of a device that is a process under MPS: what it starts from, and how it starts.

The GPU's twin of lanes that are processes on a CPU: the same pipes and orders
(muxrt.worker.process_lane), with CUDA's IPC handles in the place of descriptors of memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from muxrt.config.model import ModelShape
from muxrt.core import Result, SlotOpen, Work
from muxrt.engine.build import UnitPlan
from muxrt.errors import MuxrtError
from muxrt.models.device_llama import DeviceLlama
from muxrt.models.device_weights import DeviceWeights
from muxrt.models.weights import TensorPlace
from muxrt.worker.device_lanes import DeviceThreads, Shares
from muxrt.worker.device_runner import DeviceResident, DeviceRunner
from muxrt.worker.device_storage import ARENA, DeviceStorage
from muxrt.worker.device_streams import check_device, open_steps, plain_share
from muxrt.worker.driver import Driver, open_driver
from muxrt.worker.ipc import Imports, Piece, export
from muxrt.worker.kv_storage import Segment
from muxrt.worker.logs import log_to_stderr
from muxrt.worker.process_lane import Give, main

PIPE_DIRECTORY = "/tmp/nvidia-mps"  # MPS's own default


class SharedDeviceModel(msgspec.Struct, frozen=True):
    """Where a child process finds a model's weights."""

    shape: ModelShape
    memory: Piece
    places: dict[str, TensorPlace]


class DeviceLaneSetup(msgspec.Struct, frozen=True):
    """What a lane's process starts from."""

    name: str
    plan: UnitPlan
    ordinal: int  # of the GPU
    percent: int  # of its SMs, at most
    memory: dict[str, Piece]  # arena and slot tables, as `DeviceStorage` names them
    unscored: dict[str, int]  # descriptors, by model
    models: dict[str, SharedDeviceModel]

    @property
    def module(self) -> str:
        return "muxrt.worker.device_process"

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(self.unscored.values())

    @property
    def environ(self) -> dict[str, str]:
        """MPS reads it when the process makes its context."""
        return {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(self.percent)}


def check_mps() -> None:
    """Raise MuxrtError unless an MPS daemon serves this process."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", PIPE_DIRECTORY))
    if not (folder / "control").exists():
        raise MuxrtError(
            f"lanes.kind: found mps, but no MPS daemon has its pipe in {folder}: start one with"
            " scripts/mps.sh start"
        )


def lane_setups(
    plan: UnitPlan, models: dict[str, DeviceLlama], storage: DeviceStorage, driver: Driver
) -> Iterator[DeviceLaneSetup]:
    """One per lane; `models` and `storage` must live as long as the lanes."""
    shared = {
        name: SharedDeviceModel(
            llama.shape, export(driver, llama.weights.memory), dict(llama.weights.places)
        )
        for name, llama in models.items()
    }
    memory = {ARENA: storage.arena, **storage.memory}
    pieces = {name: export(driver, tensor) for name, tensor in memory.items()}
    unscored = {name: segment.fd for name, segment in storage.unscored.items()}
    for number, percent in enumerate(plan.spec.lanes.sm_pct or (100,)):
        yield DeviceLaneSetup(
            f"lane-{number}",
            plan,
            storage.device.index or 0,
            percent,
            pieces,
            unscored,
            shared,
        )


class DeviceChild:
    """The lane in its own process."""

    def __init__(self, setup: DeviceLaneSetup, give: Give) -> None:
        """`give` gets results in order, on a thread of its own. Raises MuxrtError, DriverError."""
        log_to_stderr(setup.name)
        device = torch.device("cuda", setup.ordinal)
        check_device(device)
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # makes the context that handles are opened in
        imports, plan = Imports(open_driver()), setup.plan
        unscored = {
            name: Segment(4 * plan.models[name].max_sequences, fd)
            for name, fd in setup.unscored.items()
        }
        storage = DeviceStorage(plan, device, imports.memory(setup.memory, device), unscored)
        weights = imports.memory(
            {name: model.memory for name, model in setup.models.items()}, device
        )
        residents = {}
        for name, model in setup.models.items():
            memory = weights(name, model.memory.num_bytes)
            llama = DeviceLlama(model.shape, DeviceWeights(memory, model.places))
            residents[name] = DeviceResident.of(llama, name, storage)
        share = plain_share("mps", device, 0)  # as MPS limits it
        shares = Shares([share], [share])
        steps = open_steps(plan, device)
        self._runner = DeviceRunner(residents, steps, lambda: shares.choose(0))
        self._threads = DeviceThreads(
            setup.name, lambda: self._runner.launch, lambda result: give(_alive(result)), device
        )
        self._threads.wait_started()

    def launch(self, work: Work) -> None:
        self._threads.launch(work)

    def learn(self, model: str, opened: tuple[SlotOpen, ...]) -> None:
        self._runner.learn(model, opened)


def _alive(result: Result | None) -> Result:
    """A process whose device is lost is of no use: its unit finds it dead."""
    if result is None:
        os._exit(1)
    return result


if __name__ == "__main__":
    main(DeviceLaneSetup, DeviceChild)
