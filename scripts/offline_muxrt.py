"""muxrt's side of `bench_vs_vllm.py offline`: one model on one lane of all cores.

python offline_muxrt.py '{"folder": FOLDER, "kv_bytes": 1073741824, "options": {"dtype": ...}}'
"""

import json
import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

from bench_unit import greedy, model_spec, own_unit
from offline_case import Case, Channel, Timing, TokenClock
from stream_read import read_bytes_per_s

from muxrt.config.model import load_shape
from muxrt.config.placement import Lanes, Memory, UnitModel, UnitSpec
from muxrt.core import Output
from muxrt.cost.memory import num_params

GIB = 1 << 30


def main(folder: Path, kv_bytes: int, options: dict[str, Any]) -> None:
    channel = Channel()
    cores = len(os.sched_getaffinity(0))
    spec = UnitSpec(
        name="offline",
        models=(UnitModel(name=folder.name),),
        memory=Memory(kv_bytes=kv_bytes),
        lanes=Lanes(split=(cores,)),
    )
    clock = TokenClock()

    def emit(outputs: tuple[Output, ...]) -> None:
        for output in outputs:
            clock.note(str(output.request_id), len(output.tokens))

    with own_unit(spec, (model_spec(folder, **options),), emit) as own:
        rids = count()

        def run(case: Case) -> Timing:
            nonlocal clock
            requests = [
                greedy(next(rids), folder.name, prompt, case.output_tokens)
                for prompt in case.prompts()
            ]
            clock = TokenClock()
            for request in requests:
                own.unit.add(request)
            own.finish()
            return clock.timing()

        channel.answer(run, _facts(folder, cores))


def _facts(folder: Path, cores: int) -> dict[str, Any]:
    """What the bandwidth of a decode step is counted from and compared with."""
    shape = load_shape(folder)
    # One row of the input embedding is read per token, the other matrices whole.
    read = num_params(shape) - (not shape.tied_embeddings) * shape.vocab_size * shape.hidden_size
    return {
        "params_read": read,
        "kv_elements_per_token": 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim,
        "stream_read": {str(size): read_bytes_per_s(size, cores) for size in (4 * read, GIB)},
    }


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(Path(told["folder"]), told["kv_bytes"], told["options"])
