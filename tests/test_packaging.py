"""`muxrt.kernels` is the folder kernels/, however muxrt came onto the machine; help is quick."""

import importlib
import inspect
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from muxrt.cli.main import VERBS, load

ROOT = Path(__file__).parent.parent
PROJECT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "muxrt", "kernels")
HEAVY = {"aiohttp", "jinja2", "numba", "numpy", "tokenizers", "torch", "transformers", "zmq"}
WHERE = "import muxrt, muxrt.kernels as k; print(muxrt.__file__, k.__file__, sep='\\n')"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Its output; on failure all it said."""
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        command, cwd=cwd, env=clean | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def where(python: Path, cwd: Path, **env: str) -> list[Path]:
    """The folders that muxrt and muxrt.kernels are imported from, seen from `cwd`."""
    files = run(python, "-c", WHERE, cwd=cwd, **env).splitlines()
    return [Path(file).resolve().parent for file in files]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder that has nothing to do with the project."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project: a build must not leave anything in this one."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in PROJECT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy / name)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A new environment that sees the libraries of this one, but not its muxrt."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    interpreter = folder / "bin" / "python"
    # A path file adds folders only: the path file of this environment's own editable muxrt,
    # which lies in them, is not read.
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    libraries |= {path for path in site.getsitepackages() if Path(path).is_dir()}
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(interpreter, "-c", script, cwd=tmp_path).strip())
    (packages / "libraries.pth").write_text("\n".join(sorted(libraries)))
    return interpreter


def install(python: Path, checkout: Path, *options: str) -> None:
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet")
    offline = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-index")
    run(*pip, *offline, *options, str(checkout), cwd=checkout.parent)


@pytest.mark.slow
def test_an_editable_install(python: Path, checkout: Path, elsewhere: Path) -> None:
    install(python, checkout, "--editable")
    for cwd in (elsewhere, checkout):
        assert where(python, cwd) == [checkout / "muxrt", checkout / "kernels"]


@pytest.mark.slow
def test_a_plain_install(python: Path, checkout: Path, elsewhere: Path) -> None:
    install(python, checkout)
    muxrt, kernels = where(python, elsewhere)
    assert muxrt.is_relative_to(python.parent.parent)
    assert kernels == muxrt / "kernels"
    # From the root of a checkout its muxrt/ comes first, and must bring its kernels/.
    assert where(python, checkout) == [checkout / "muxrt", checkout / "kernels"]
    assert "bench" in run(python.parent / "muxrt", "--help", cwd=elsewhere)


def test_an_uninstalled_checkout(python: Path, checkout: Path, elsewhere: Path) -> None:
    expected = [checkout / "muxrt", checkout / "kernels"]
    assert where(python, checkout) == expected
    assert where(python, elsewhere, PYTHONPATH=str(checkout)) == expected


def test_the_wheel_and_the_sdist_are_complete(checkout: Path, elsewhere: Path) -> None:
    build = "from setuptools import build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})"
    run(sys.executable, "-c", build.format(str(elsewhere)), cwd=checkout)
    (wheel,) = elsewhere.glob("*.whl")
    (sdist,) = elsewhere.glob("*.tar.gz")
    sources = {p.relative_to(checkout) for p in checkout.glob("muxrt/**/*") if p.is_file()}
    sources |= {p.relative_to(checkout) for p in checkout.glob("kernels/**/*.py")}
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    installed = {str(p) if p.parts[0] == "muxrt" else f"muxrt/{p}" for p in sources}
    assert installed <= names
    assert {name.partition("/")[0] for name in names} == {"muxrt", wheel_info(wheel)}
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {str(p) for p in sources} | {"setup.py", "pyproject.toml", "LICENSE"} <= names


def wheel_info(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def test_the_lock_holds_every_requirement() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    locked = {canonicalize_name(pin.name): pin.specifier for pin in pinned}
    assert all(len(pin) == 1 and str(pin).startswith("==") for pin in locked.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"] + project["optional-dependencies"]["test"]:
        wanted = Requirement(line)
        version = str(locked[canonicalize_name(wanted.name)]).removeprefix("==")
        assert wanted.specifier.contains(version), line


@pytest.mark.parametrize("arguments", [["-c", "import muxrt"], ["-m", "muxrt", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "muxrt" in loaded
    assert not loaded & HEAVY


def test_help_lists_every_verb() -> None:
    shown = run(sys.executable, "-m", "muxrt", "--help", cwd=ROOT, COLUMNS="200")
    for name, verb in VERBS.items():
        assert name in shown
        assert verb.help in shown


@pytest.mark.parametrize("name", VERBS)
def test_the_help_line_of_a_verb_is_its_own(name: str) -> None:
    verb = VERBS[name]
    assert (inspect.getdoc(load(verb)) or "").splitlines()[0] == verb.help
    file = importlib.import_module(verb.target.partition(":")[0]).__file__
    assert file == str(ROOT / "muxrt" / "cli" / f"{name}.py")
