"""How quick is the simulator?

    python scripts/bench_sim.py azure TRACE   # Azure's conversation hour on 8 GPUs, one core
    python scripts/bench_sim.py million       # a million requests on 256 GPUs, two processes
    python scripts/bench_sim.py simpy TRACE   # beside a minimal loop in SimPy (pip install simpy)

TRACE is AzureLLMInferenceTrace_conv.csv of the Azure Public Dataset (2023). Every token step of
every request is simulated. CPU seconds are of the simulation alone: compiled code is loaded before,
the trace is read before. A busy machine adds some ten per cent; the least of several is closest.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from threading import Event, Thread
from time import perf_counter, process_time
from typing import Annotated, Any

import typer
from bench_record import FOLDER, provenance
from msgspec import structs
from process_memory import tree_memory
from rich.console import Console
from rich.table import Table
from sim_speed_cases import AZURE_CASES, Case, azure_case, azure_rows, large_case

from muxrt.sim.report import make_report
from muxrt.sim.simulate import Map, Run, simulate

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Trace = Annotated[Path, typer.Argument(help="Azure's CSV.", exists=True, dir_okay=False)]
Out = Annotated[Path, typer.Option(help="Folder of the JSON.")]
Duration = Annotated[float, typer.Option(help="Seconds of the trace.")]
Repeat = Annotated[int, typer.Option(min=1, help="Runs of each case; the least counts.")]

WARM_S = 20.0  # of the trace, before anything is measured: compiled code is loaded
MEMORY_EVERY_S = 1.0
MIB = 1 << 20
MOST_TOKENS = 1 << 17  # of a sequence: what an arena of the 8B model's replicas holds thrice


def write(part: str, out: Path, value: dict[str, Any]) -> None:
    """Put a part into the file; the others stay as they were measured."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "sim_speed.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    data[part] = {**provenance(), **value}
    path.write_text(json.dumps(data, indent=1) + "\n")


def work_of(case: Case, run: Run) -> dict[str, int]:
    """How much was simulated."""
    return {
        "requests": len(case.arrivals),
        "answered": sum(served.is_answered for served in run.served),
        "batches": sum(unit.num_batches for unit in run.units),
        "tokens": sum(served.output_tokens for served in run.served),
    }


def timed(case: Case, repeat: int) -> dict[str, Any]:
    """CPU seconds of one process, least and all."""
    found, done = [], {}
    for _ in range(repeat):
        begun_s = process_time()
        run = simulate(case.config, case.setting, case.arrivals)
        found.append(round(process_time() - begun_s, 2))
        done = work_of(case, run)
    return {**done, "cpu_s": min(found), "all_cpu_s": found}


def show(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """A table."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns))
    Console().print(table)


@app.command()
def azure(trace: Trace, duration: Duration = 3600.0, repeat: Repeat = 3, out: Out = FOLDER) -> None:
    """Azure's conversation service on 8 H100, by roofline, on one core."""
    rows, warm_rows = azure_rows(trace, duration), azure_rows(trace, WARM_S)
    found = []
    for name in AZURE_CASES:
        timed(azure_case(name, warm_rows), 1)
        found.append({"case": name, **timed(azure_case(name, rows), repeat)})
        show(found[-1:], ["case", "requests", "batches", "tokens", "cpu_s", "all_cpu_s"])
    write("azure", out, {"duration_s": duration, "cases": found})


@app.command()
def million(
    requests: Annotated[int, typer.Option(min=1)] = 1_000_000,
    models: Annotated[int, typer.Option(min=1)] = 120,
    gpus: Annotated[int, typer.Option(min=8, help="A multiple of 8.")] = 256,
    load: Annotated[float, typer.Option(min=0.01, help="Of the traffic planned for.")] = 0.5,
    processes: Annotated[int, typer.Option(min=1)] = 2,
    out: Out = FOLDER,
) -> None:
    """Many models on many GPUs: wall seconds, CPU seconds, and the memory of all processes."""
    command = [sys.executable, __file__, "part", *map(str, (requests, models, gpus, processes))]
    begun_s = perf_counter()
    child = subprocess.Popen([*command, "--load", str(load)], stdout=subprocess.PIPE, text=True)
    with memory_of(child.pid) as peak:
        answer, _ = child.communicate()
    if child.returncode:
        raise typer.Exit(1)
    whole = {"wall_s_with_planning_and_report": round(perf_counter() - begun_s, 1), **peak}
    row = {**json.loads(answer), **whole}
    Console().print(row)
    write("million", out, row)


@contextmanager
def memory_of(pid: int) -> Iterator[dict[str, int]]:
    """The peak of a process and its children, looked at once a second."""
    peak, is_over = {"peak_rss_mib": 0, "peak_pss_mib": 0}, Event()

    def watch() -> None:
        while not is_over.wait(MEMORY_EVERY_S):
            now = tree_memory([pid])
            peak["peak_rss_mib"] = max(peak["peak_rss_mib"], now.rss_bytes // MIB)
            peak["peak_pss_mib"] = max(peak["peak_pss_mib"], now.pss_bytes // MIB)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()


@app.command("part", hidden=True)
def part_of_million(
    requests: int, models: int, gpus: int, processes: int, load: Annotated[float, typer.Option()]
) -> None:
    """`million`, in a process whose memory is watched."""
    case = large_case(models, gpus, requests, load)
    begun_s, used_s = perf_counter(), cpu_s()
    with pool(processes) as map_:
        run = simulate(case.config, case.setting, case.arrivals, map_)
    slos = {model.name: model.slo for model in case.config.models}
    report = make_report(run.served, run.units, slos, max(a.at_s for a in case.arrivals))
    row = {
        "models": models,
        "gpus": gpus,
        "units": len(run.units),
        "processes": processes,
        "load": load,
        **work_of(case, run),
        "simulated_s": round(report.duration_s, 1),
        "attainment": report.total.attainment and round(report.total.attainment, 4),
        "wall_s": round(perf_counter() - begun_s, 1),
        "cpu_s": round(cpu_s() - used_s, 1),
    }
    print(json.dumps(row))


@contextmanager
def pool(processes: int) -> Iterator[Map]:
    """As `muxrt simulate --processes` does."""
    if processes == 1:
        yield map
        return
    with ProcessPoolExecutor(processes) as executor:
        yield executor.map


def cpu_s() -> float:
    """CPU seconds of this process and its children that have ended."""
    used = [getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@app.command("simpy")
def simpy_part(
    trace: Trace, duration: Duration = 600.0, repeat: Repeat = 3, out: Out = FOLDER
) -> None:
    """Decode steps per CPU second beside a minimal SimPy loop: 8 replicas of an 8B model."""
    try:
        from simpy_loop import run_simpy
    except ImportError:
        Console(stderr=True).print("this part needs SimPy: pip install simpy")
        raise typer.Exit(1) from None
    timed(azure_case("8b", azure_rows(trace, WARM_S)), 1)
    found, rows = [], azure_rows(trace, duration)
    for title, longer in (
        ("as recorded", 1),
        ("answers 8 times as long", 8),
        ("answers 64 times as long", 64),
    ):
        # So many requests fewer: about as many tokens are generated per second.
        case = longer_answers(azure_case("8b", rows[::longer]), longer)
        ours = timed(case, repeat)
        theirs = []
        for _ in range(repeat):
            begun_s = process_time()
            units = run_simpy(case)
            theirs.append(process_time() - begun_s)
        steps = sum(unit.num_steps for unit in units)
        rates = {
            "ours_per_s": round(ours["batches"] / ours["cpu_s"]),
            "simpy_per_s": round(steps / min(theirs)),
        }
        found.append(
            {
                "case": title,
                **ours,
                "simpy_cpu_s": round(min(theirs), 2),
                "steps_per_request": round(steps / ours["requests"]),
                "simpy_steps": steps,
                "simpy_tokens": sum(unit.num_tokens for unit in units),
                **rates,
                "ratio": round(rates["ours_per_s"] / rates["simpy_per_s"], 1),
            }
        )
        show(found[-1:], ["case", "steps_per_request", *rates, "ratio"])
    write("simpy", out, {"duration_s": duration, "cases": found})


def longer_answers(case: Case, times: int) -> Case:
    """The same requests, each with so many times the answer, and a model that can hold it."""
    from dataclasses import replace

    (model,) = case.config.models
    assert model.max_model_len is not None
    longest = min(times * model.max_model_len, MOST_TOKENS)
    config = structs.replace(case.config, models=(structs.replace(model, max_model_len=longest),))
    shape = replace(case.setting.shapes[model.name], max_positions=longest)
    setting = replace(case.setting, shapes={model.name: shape})
    longer = [
        replace(a, output_tokens=min(times * a.output_tokens, longest - a.prompt_tokens))
        for a in case.arrivals
    ]
    return replace(case, config=config, setting=setting, arrivals=longer)


if __name__ == "__main__":
    app()
