"""A `muxrt serve` of one's own: started on a free port, watched until ready, stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from muxrt.bench.client import EndpointError
from muxrt.config.load import dump
from muxrt.config.serve import ServeConfig

SERVE = (sys.executable, "-m", "muxrt", "serve")
POLL_S = 0.1
LOG_LINES_SHOWN = 15
KILL_AFTER_S = 10.0  # beyond the endpoint's own drain_s


@dataclass(frozen=True, slots=True)
class OwnEndpoint:
    """A server process that this command started."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    drain_s: float

    def wait_ready(self, say: Callable[[str], None]) -> None:
        """Return once every model answers; `say` is told what loads meanwhile.

        Raises EndpointError with the end of the log if the server gives up.
        """
        while self.process.poll() is None:
            ready, progress = _ask_ready(self.url)
            if ready:
                return
            say(progress)
            time.sleep(POLL_S)
        raise EndpointError(
            f"muxrt serve gave up with exit code {self.process.returncode};"
            f" its log {self.log} ends with:\n" + _tail(self.log)
        )

    def stop(self) -> None:
        """Let it drain, then make sure: nothing of it is left when this returns."""
        try:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(self.drain_s + KILL_AFTER_S)
        finally:  # also where an impatient Ctrl-C ends the wait
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def start_endpoint(file: Path, config: ServeConfig, log: Path, *words: str) -> OwnEndpoint:
    """Start `muxrt serve FILE` on its own port, or on a free one where that is taken.

    `words` go behind: options of `muxrt serve`.
    """
    host = config.endpoint.host
    port = choose_port(host, config.endpoint.port)
    command = [*SERVE, str(file), "--port", str(port), *words]
    with log.open("wb") as output:
        # A session of its own: Ctrl-C reaches this command only, which then lets the server drain.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return OwnEndpoint(process, f"http://{_reachable(host)}:{port}", log, config.endpoint.drain_s)


@contextmanager
def ready_endpoint(config: ServeConfig) -> Iterator[OwnEndpoint]:
    """A server of `config` in which every model answers; nothing of it is left after the block.

    Raises EndpointError if it gives up.
    """
    with tempfile.TemporaryDirectory(prefix="muxrt-endpoint-") as folder:
        file = Path(folder) / "serve.yaml"
        file.write_text(dump(config), encoding="utf-8")
        endpoint = start_endpoint(file, config, Path(folder) / "serve.log")
        try:
            endpoint.wait_ready(lambda _: None)
            yield endpoint
        finally:
            endpoint.stop()


def choose_port(host: str, preferred: int) -> int:
    """`preferred` if nobody listens there, else any free port."""
    for port in (preferred, 0):
        with socket.socket(_family(host)) as probe:
            # As servers do: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EndpointError(f"cannot listen on {host}: change endpoint.host")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _reachable(host: str) -> str:
    """The address under which a server that listens on `host` is found from here."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _ask_ready(url: str) -> tuple[bool, str]:
    """Whether every model answers, and what the server says meanwhile."""
    try:
        with urlopen(f"{url}/ready", timeout=5) as response:
            return response.status == 200, ""
    except HTTPError as error:
        return False, _progress(error.read())
    except (URLError, OSError):
        return False, "starting"


def _progress(body: bytes) -> str:
    try:
        said = json.loads(body)
    except ValueError:
        return "loading"
    return str(said.get("message") or "loading") if isinstance(said, dict) else "loading"


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_LINES_SHOWN:])
