"""A process of ours behind two pipes: orders go down one, results come up the other."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import muxrt


class Piped(NamedTuple):
    """The process, and this end of its pipes: descriptors that whoever started it closes."""

    process: subprocess.Popen[bytes]
    orders: int  # to be written
    results: int  # to be read; it does not wait


def start_piped(
    module: str,
    descriptors: Sequence[int] = (),
    arguments: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Piped:
    """Start `python -m MODULE ORDERS_FD RESULTS_FD ARGUMENTS`.

    It inherits `descriptors` under the same numbers; `environ` are variables of its own.
    """
    down, orders = os.pipe()
    results, up = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(down), str(up), *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=(down, up, *descriptors),
            env={**os.environ, "PYTHONPATH": _python_path(), **(environ or {})},
        )
    finally:
        os.close(down)
        os.close(up)
    os.set_blocking(results, False)
    return Piped(process, orders, results)


def _python_path() -> str:
    """Where this process finds muxrt, the child must too, wherever it was started."""
    home = str(Path(muxrt.__file__).parent.parent)
    return os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
