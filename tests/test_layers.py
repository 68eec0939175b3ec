"""Who may import whom, what may use torch, how large things may grow: the house keeps itself."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# A unit is a file or folder right under muxrt/; it may import itself and these.
BASE = {"errors", "core", "metrics", "config"}
BRAIN = BASE | {"kvcache", "cost", "sched"}
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "metrics": {"errors", "core"},
    "config": {"errors"},
    "kvcache": BASE,
    "cost": BASE | {"kvcache"},
    "sched": BASE | {"kvcache", "cost"},
    "planner": BASE | {"kvcache", "cost"},
    "engine": BRAIN | {"planner"},
    "workload": BASE,
    "sim": BRAIN | {"planner", "engine", "workload"},
    "kernels": set(),
    "models": BASE | {"kernels"},
    "worker": BRAIN | {"engine", "models", "kernels"},
    "server": BASE | {"planner", "engine"},
    "cluster": BASE | {"engine", "worker"},
    "bench": BASE | {"workload"},
}
WIRING = {"cli", "__main__", "__init__"}  # may import every unit

# What a unit may use besides the standard library, numpy and msgspec.
EVERYWHERE = {"numpy", "msgspec"}
LIBRARIES = {
    "config": {"yaml"},
    "cost": {"numba", "scipy"},
    "sim": {"scipy"},
    "planner": {"numba"},
    "kernels": {"torch", "triton", "numba", "llvmlite"},
    "models": {"torch", "safetensors"},
    "worker": {"torch", "safetensors", "zmq", "nixl", "vllm", "cuda"},
    "server": {"aiohttp", "jinja2", "prometheus_client", "tokenizers", "uvloop", "zmq"},
    "cluster": {"ray", "zmq"},
    "bench": {"aiohttp", "rich"},
    "cli": {"matplotlib", "prometheus_client", "pyarrow", "rich", "typer", "uvloop"},
}

# The brain is called with time, luck and what was read; it looks for none of them itself.
PURE = BRAIN | {"planner", "engine", "sim", "workload"}
NO_IO = {"asyncio", "multiprocessing", "selectors", "signal", "socket", "subprocess"}
NO_IO |= {"threading", "time", "concurrent"}

OPEN_ENDS = re.compile(r"\b(?:TODO|FIXME)\b(?!\(#\d+\))")
MACHINE_PATHS = re.compile(r"(?<![\w.:/])/(?:work|root|home|Users|tmp/w)/")
TEXT = {".py", ".sh", ".md", ".toml", ".yaml", ".yml", ".lock", ".txt", ".in"}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name, absolute: `muxrt.sched.queues.Queue`."""

    name: str
    line: int
    in_function: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def unit(self) -> str | None:
        """The unit of muxrt that is imported; None for other packages."""
        parts = self.name.split(".")
        return parts[1] if self.top == "muxrt" and len(parts) > 1 else None


@dataclass(frozen=True)
class Source:
    """One file of muxrt/ or kernels/."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def unit(self) -> str:
        return self.module.split(".")[1] if "." in self.module else "__init__"

    @property
    def label(self) -> str:
        return str(self.path.relative_to(ROOT))

    def imports(self) -> Iterator[Import]:
        functions = (n for n in ast.walk(self.tree) if isinstance(n, FUNCTIONS))
        nested = {node for function in functions for node in ast.walk(function)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            yield from (Import(name, node.lineno, node in nested) for name in names)


@cache
def sources() -> tuple[Source, ...]:
    found = []
    for folder, package in (("muxrt", "muxrt"), ("kernels", "muxrt.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            module = ".".join([package, *inside]).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            found.append(Source(path, module, text, ast.parse(text)))
    return tuple(found)


def violations(rule: Callable[[Source, Import], bool]) -> str:
    """Where `rule` is broken, a line each."""
    return "\n".join(
        f"{source.label}:{found.line}: {found.name}"
        for source in sources()
        for found in source.imports()
        if rule(source, found)
    )


def test_every_unit_has_a_place() -> None:
    assert {source.unit for source in sources()} <= MAY_IMPORT.keys() | WIRING


def test_the_layers_have_no_cycle() -> None:
    assert list(TopologicalSorter(MAY_IMPORT).static_order())


def test_imports_point_down() -> None:
    def points_up(source: Source, found: Import) -> bool:
        if found.unit is None or source.unit in WIRING or found.unit == source.unit:
            return False
        return found.unit not in MAY_IMPORT[source.unit] | {"__version__"}

    assert not violations(points_up)


def test_libraries_stay_in_their_units() -> None:
    def strays(source: Source, found: Import) -> bool:
        allowed = {"muxrt"} | EVERYWHERE | LIBRARIES.get(source.unit, set())
        return found.top not in allowed and found.top not in sys.stdlib_module_names

    assert not violations(strays)


def test_the_brain_does_no_io() -> None:
    assert not violations(lambda source, found: source.unit in PURE and found.top in NO_IO)


def test_own_imports_stand_at_the_top() -> None:
    """An import inside a function hides a cycle; only verbs load late, so that help is quick."""

    def hides(source: Source, found: Import) -> bool:
        return found.in_function and found.top == "muxrt" and source.unit not in WIRING

    assert not violations(hides)


def test_modules_have_no_cycle() -> None:
    modules = {source.module for source in sources()}

    def needed(source: Source) -> set[str]:
        names = {found.name for found in source.imports() if not found.in_function}
        names |= {name.rpartition(".")[0] for name in names - modules}
        # A package may gather its own files; a file of it may import another one meanwhile.
        return {name for name in names & modules if not source.module.startswith(f"{name}.")}

    try:
        TopologicalSorter({s.module: needed(s) - {s.module} for s in sources()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_files_stay_small() -> None:
    sizes = {source.label: len(source.text.splitlines()) for source in sources()}
    assert not {label: lines for label, lines in sizes.items() if lines > MAX_FILE_LINES}


def test_functions_stay_small() -> None:
    large = [
        f"{source.label}:{node.lineno}: {node.name} has {lines} lines"
        for source in sources()
        if source.unit != "kernels"
        for node in ast.walk(source.tree)
        if isinstance(node, FUNCTIONS)
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not large, "\n".join(large)


def test_modules_say_what_they_hold() -> None:
    assert not [source.label for source in sources() if not ast.get_docstring(source.tree)]


def tracked() -> list[Path]:
    """The text files of the repository; of a folder without git, all of them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = listed.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    paths = (ROOT / name for name in names)
    return [p for p in paths if p.is_file() and (p.suffix in TEXT or ".ci" in p.parts)]


@pytest.mark.parametrize("pattern", [OPEN_ENDS, MACHINE_PATHS], ids=["open-ends", "machine-paths"])
def test_no_file_says(pattern: re.Pattern[str]) -> None:
    """A loose end names its issue as `(#12)`; a path of one machine means nothing on another."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
