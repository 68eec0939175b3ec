"""An engine in a process of its own, which runs a case when it is told to and stands still else."""

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from offline_case import Case, Timing


class EngineDied(RuntimeError):
    """The process ended; its log says why."""


class EngineProcess:
    """Started by `start`; loads until `wait_ready`, then answers `run`."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=env,
                text=True,
                start_new_session=True,  # its children stop, go on and end with it
            )
        self.facts: dict[str, Any] = {}

    def wait_ready(self) -> None:
        """Return when it takes cases; it stands still then."""
        self.facts = self._read()
        self._signal(signal.SIGSTOP)

    def run(self, case: Case) -> Timing:
        """Wake it, run `case`, and let it stand still again."""
        assert self._process.stdin is not None
        # Stopped, not idle: threads that spin for their next work would take the other's cores.
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(asdict(case)) + "\n")
        self._process.stdin.flush()
        timing = Timing(**self._read())
        self._signal(signal.SIGSTOP)
        return timing

    def close(self) -> None:
        """Kill it and all it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
        raise EngineDied(f"an engine ended; its log {self.log} ends with:\n{tail}")

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
