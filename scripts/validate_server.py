"""Our own server on this machine against the simulator: profile it, serve requests, simulate them.

    python scripts/validate_server.py measure --out docs/benchmarks/validation_server.json
    python scripts/validate_server.py show docs/benchmarks/validation_server.json

`measure` takes about 20 minutes per setup of lanes and wants the machine for itself. Each load is
sent several times, loads in turn, so that what drifts does so for all of them.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from bench_models import preset_folders
from bench_record import provenance, stop_on_sigterm
from bench_serving import Serving, muxrt_serving, one_unit, shares_of
from server_runs import Asked, Load, Record, Run, Setup, capacity_rps, replays, world

from muxrt.bench.client import replay as send_all
from muxrt.bench.client import session
from muxrt.bench.job import Job, Progress, Status, Target
from muxrt.bench.run import make_jobs
from muxrt.cli.batch_counts import batches_since, read_batches
from muxrt.config.load import dump
from muxrt.config.placement import Lanes, Memory, Mesh, Scheduling
from muxrt.config.serve import ServeConfig
from muxrt.workload.arrivals import arrivals
from muxrt.workload.spec import Lengths, Traffic, Workload

MODELS, WEIGHTS = ("27m", "27m-gqa", "88m"), (60.0, 30.0, 10.0)
PROMPT = Lengths(mean_tokens=100, cv=0.5, max_tokens=300)
OUTPUT = Lengths(mean_tokens=60, cv=0.5, max_tokens=150)
LOADS = (0.4, 0.6, 0.8, 1.0, 1.2)
MAX_MODEL_LEN, SEED, SAMPLE_REQUESTS = 512, 7, 200
REPORT_S = 1.5  # in which a unit that went idle has said what it computed


def config_of(folders: Sequence[Path], split: tuple[int, ...]) -> ServeConfig:
    """One unit on all cores of this machine."""
    config = one_unit(
        folders,
        WEIGHTS[: len(folders)],
        Memory(kv_bytes=768 << 20),
        Lanes(split=split),
        Scheduling(prefix_reuse=False),  # as simulated requests have no prefix in common
        max_model_len=MAX_MODEL_LEN,
    )
    kind = f"cpu-{len(os.sched_getaffinity(0))}c"  # as `muxrt profile` calls it
    unit = msgspec.structs.replace(config.units[0], mesh=Mesh(kind=kind, gpus=(0,)))
    return msgspec.structs.replace(config, units=(unit,))


def workload(models: Sequence[str], rate_rps: float, duration_s: float) -> Workload:
    """Poisson arrivals of all models."""
    shares = shares_of(WEIGHTS[: len(models)])
    return Workload(
        duration_s=duration_s,
        seed=SEED,
        models=tuple(
            Traffic(name=n, rate_rps=rate_rps * part)
            for n, part in zip(models, shares, strict=True)
        ),
        prompt=PROMPT,
        output=OUTPUT,
    )


def profile(options: argparse.Namespace, folders: Sequence[Path]) -> None:
    """`muxrt profile` of the models on lanes of the sizes that serve."""
    out, lanes = options.profile, {size for name in options.lanes for size in split_of(name)}
    file = out.with_suffix(".serve.yaml")
    file.write_text(dump(config_of(folders, (1,))))
    command = [sys.executable, "-m", "muxrt", "profile", str(file), "--out", str(out)]
    command += ["--lanes", ",".join(str(size) for size in sorted(lanes)), "--kv", "4GiB"]
    command += ["--budget", str(options.budget), *(["--quick"] if options.quick else [])]
    try:
        subprocess.run(command, check=True)
    finally:
        file.unlink()


class Client:
    """Sends the requests of loads to a server, as often as asked."""

    def __init__(self, serving: Serving) -> None:
        self._url = serving.urls[0]
        self._jobs: dict[float, list[Job]] = {}

    def run(self, load: float, traffic: Workload) -> tuple[tuple[Asked, ...], Run]:
        """The requests of a load, by the server's count of tokens, and what became of them."""
        return asyncio.run(self._run(load, traffic))

    async def _run(self, load: float, traffic: Workload) -> tuple[tuple[Asked, ...], Run]:
        target = Target(self._url)
        async with session(target) as http:
            routes = {model.name: target for model in traffic.models}
            if load not in self._jobs:
                plan = arrivals(traffic)
                self._jobs[load] = await make_jobs(http, routes, plan, traffic.seed)
            jobs = self._jobs[load]
            await asyncio.sleep(REPORT_S)
            before, begun_s = read_batches(self._url), time.process_time()
            done = await send_all(http, routes, jobs, Progress(len(jobs)))
            client_s = time.process_time() - begun_s
            await asyncio.sleep(REPORT_S)
        lost = [one.error or one.status.value for one in done if one.status is not Status.OK]
        if lost:
            raise SystemExit(f"{len(lost)} requests were not answered: {lost[0]}")
        asked = tuple(Asked(o.due_s, o.model, o.prompt_tokens, o.output_tokens) for o in done)
        timings = [one.timing for one in done]
        return asked, Run(
            tuple(one.ttft_s or 0.0 for one in done),
            tuple(timing.tpot_s for timing in timings),
            max(one.due_s + (one.last_s or 0.0) for one in done),
            tuple(batches_since(before, read_batches(self._url)).values()),
            client_s,
        )


def split_of(name: str) -> tuple[int, ...]:
    """Cores of each lane, from 1+1."""
    return tuple(int(part) for part in name.split("+"))


def measure_setup(options: argparse.Namespace, name: str, folders: Sequence[Path]) -> Setup:
    """Find what the lanes can answer, and serve every load, several times."""
    config = config_of(folders, split_of(name))
    setup = Setup(name, config, options.profile.name)
    models = [folder.name for folder in folders]
    sample = [
        Asked(a.at_s, a.model, a.prompt_tokens, a.output_tokens)
        for a in arrivals(workload(models, SAMPLE_REQUESTS / 100, 100.0))
    ]
    most_rps = capacity_rps(world(setup, options.profile.parent), sample)
    print(f"lanes {name}: {most_rps:.2f} requests/s at most, by the simulator", flush=True)
    traffic = {load: workload(models, load * most_rps, options.seconds) for load in options.loads}
    runs: dict[float, list[Run]] = {load: [] for load in traffic}
    asked: dict[float, tuple[Asked, ...]] = {}
    with muxrt_serving(config) as serving:
        client = Client(serving)
        client.run(0.0, workload(models, most_rps, min(5.0, options.seconds)))  # warm-up
        for number in range(options.runs):
            for load, one in traffic.items():
                asked[load], run = client.run(load, one)
                runs[load].append(run)
                print(f"lanes {name}, run {number + 1}, load {load:.0%}: done", flush=True)
    return msgspec.structs.replace(
        setup,
        # Where weights are is nobody's business; the profile has the shapes.
        config=_without_paths(config),
        loads=tuple(
            Load(load, load * most_rps, asked[load], tuple(runs[load])) for load in traffic
        ),
    )


def _without_paths(config: ServeConfig) -> ServeConfig:
    models = tuple(msgspec.structs.replace(m, path=Path(m.path or "").name) for m in config.models)
    return msgspec.structs.replace(config, models=models)


def measure(options: argparse.Namespace) -> None:
    """All setups, written after each."""
    folders = options.folders or preset_folders(MODELS)
    about: dict[str, Any] = {
        **provenance(),
        "models": [folder.name for folder in folders],
        "prompt": msgspec.to_builtins(PROMPT),
        "output": msgspec.to_builtins(OUTPUT),
        "seconds": options.seconds,
        "how": "float32, greedy, ignore_eos; client and server on the same cores",
    }
    record = Record(about)
    if options.profile is None:
        options.profile = options.out.with_name(f"{options.out.stem}_profile.yaml")
        profile(options, folders)
    for name in options.lanes:
        setup = measure_setup(options, name, folders)
        record = msgspec.structs.replace(record, setups=(*record.setups, setup))
        options.out.write_bytes(_rounded(record))
    show(options.out, options.plot)


def _rounded(record: Record) -> bytes:
    """JSON with times to the microsecond."""

    def cut(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 6)
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        return [cut(item) for item in value] if isinstance(value, list | tuple) else value

    return msgspec.json.encode(cut(msgspec.to_builtins(record))) + b"\n"


def show(path: Path, plot: Path | None) -> None:
    """Tables for docs/validation.md, and the picture where it is asked for."""
    from server_tables import draw, print_setup

    record = msgspec.json.decode(path.read_bytes(), type=Record)
    for setup in record.setups:
        here = world(setup, path.parent)
        simulated = [replays(here, load.asked) for load in setup.loads]
        print_setup(setup, simulated)
    if plot is not None:
        draw(record, path.parent, plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("measure")
    part.add_argument("--out", type=Path, required=True, help="JSON; the profile lies beside it")
    part.add_argument("--profile", type=Path, help="one that lies there already")
    part.add_argument("--lanes", type=lambda text: text.split(","), default=["1", "1+1"])
    part.add_argument(
        "--loads", type=lambda text: [float(p) for p in text.split(",")], default=list(LOADS)
    )
    part.add_argument("--runs", type=int, default=5, help="of each load")
    part.add_argument("--seconds", type=float, default=25.0, help="of arrivals of each run")
    part.add_argument("--budget", type=float, default=240.0, help="seconds of each profile")
    part.add_argument("--quick", action="store_true", help="a rough profile")
    part.add_argument("--folders", type=Path, nargs="*", help="models, instead of made ones")
    part.add_argument("--plot", type=Path)
    part = parts.add_parser("show")
    part.add_argument("out", type=Path)
    part.add_argument("--plot", type=Path)
    options = parser.parse_args()
    stop_on_sigterm()
    measure(options) if options.part == "measure" else show(options.out, options.plot)


if __name__ == "__main__":
    main()
