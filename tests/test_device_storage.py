"""Memory of a unit on a device, with the CPU as the device: slots, blocks, padding, sharing."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from muxrt.config.placement import Lanes  # noqa: E402
from muxrt.engine.build import UnitPlan  # noqa: E402
from muxrt.worker.device_storage import Blocks, DeviceStorage, own_memory  # noqa: E402
from muxrt.worker.kv_storage import Storage  # noqa: E402
from tests.worker_world import make_plan, write_models  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> UnitPlan:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return make_plan(folder, planes_per_block=2, lanes=Lanes(kind="processes"))


def test_it_holds_what_the_host_storage_holds(plan: UnitPlan) -> None:
    """The same slots, tables, views of the arena and host blocks, after the same writes."""
    there, here = DeviceStorage(plan, CPU), Storage(plan)
    tokens, ids = np.arange(7, dtype=np.int32), np.array([5, 3, 9, 2], dtype=np.int32)
    for model in plan.models:
        there.slots[model].open(3, tokens)
        here.slots[model].open(3, tokens)
        there.slots[model].append([Blocks(3, 1, ids), Blocks(0, 0, ids[:2]), Blocks(1, 0, ids[:0])])
        here.slots[model].append(3, 1, ids)
        here.slots[model].append(0, 0, ids[:2])
        slots = len(here.slots[model].tokens)
        assert (there.slots[model].tokens[:slots].numpy() == here.slots[model].tokens).all()
        assert (there.slots[model].block_table == here.slots[model].block_table).all()
        assert (there.slots[model].unscored == here.slots[model].unscored).all()
        mine, theirs = there.kv_cache(model), here.kv_cache(model)
        assert mine.arena.shape == theirs.arena.shape and mine.arena.dtype == theirs.arena.dtype
        assert mine.plane_elems == theirs.plane_elems
    assert len(there.host) == here.host.num_bytes > 0
    there.close()
    here.close()


def test_padding_has_a_row_of_tokens_but_no_blocks(plan: UnitPlan) -> None:
    storage = DeviceStorage(plan, CPU)
    model = plan.models["wide"]
    slots = storage.slots["wide"]
    assert slots.scratch == model.max_sequences
    slots.tokens[slots.scratch].fill_(7)
    assert not slots.tokens[: slots.scratch].any() and not slots.block_table.any()
    storage.close()


def test_another_process_computes_with_the_same_memory(plan: UnitPlan) -> None:
    """Whoever is given the pieces by name sees what the owner writes; host blocks are its own."""
    owner = DeviceStorage(plan, CPU)
    pieces = {"": owner.arena, **owner.memory}
    other = DeviceStorage(plan, CPU, lambda name, size: pieces[name][:size], owner.unscored)
    owner.slots["narrow"].open(2, np.full(4, 11, dtype=np.int32))
    owner.arena.fill_(1)
    assert other.slots["narrow"].tokens[2, :4].tolist() == [11] * 4
    assert other.slots["narrow"].unscored[2] == 1
    assert bool(other.kv_cache("wide").arena.view(torch.uint8).all())
    assert len(other.host) == 0
    owner.close()


def test_models_are_given_memory_of_their_own_names(plan: UnitPlan) -> None:
    asked: dict[str, int] = {}
    allocate = own_memory(CPU)

    def note(name: str, num_bytes: int) -> torch.Tensor:
        asked[name] = num_bytes
        return allocate(name, num_bytes)

    DeviceStorage(plan, CPU, note).close()
    assert asked[""] == plan.num_blocks * plan.arena.block_bytes
    assert asked.keys() == {"", *plan.models}
