"""scripts/mps.sh against a daemon that only keeps its pipe."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "mps.sh"
DAEMON = """\
#!/bin/sh
if [ "$1" = -d ]; then
    touch "$CUDA_MPS_PIPE_DIRECTORY/control"
    exit 0
fi
[ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ] || exit 1
read -r order
[ "$order" = quit ] && rm "$CUDA_MPS_PIPE_DIRECTORY/control"
exit 0
"""


class Mps:
    def __init__(self, home: Path) -> None:
        self.pipe = home / "pipe" / "control"
        self._environ = {
            "PATH": f"{home}:/usr/bin:/bin",
            "CUDA_MPS_PIPE_DIRECTORY": str(home / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(home / "log"),
        }

    def __call__(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            env=self._environ,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, (done.stdout + done.stderr).strip()


@pytest.fixture
def mps(tmp_path: Path) -> Mps:
    return Mps(tmp_path)


@pytest.fixture
def daemon(tmp_path: Path) -> None:
    path = tmp_path / "nvidia-cuda-mps-control"
    path.write_text(DAEMON)
    path.chmod(0o755)


@pytest.mark.usefixtures("daemon")
def test_it_starts_once_and_stops_once(mps: Mps) -> None:
    assert mps("start") == (0, f"MPS serves {mps.pipe.parent}")
    assert mps.pipe.exists()
    assert mps("start") == (0, f"MPS already serves {mps.pipe.parent}")
    assert mps("stop") == (0, "MPS ended")
    assert not mps.pipe.exists()
    assert mps("stop") == (0, f"no MPS serves {mps.pipe.parent}")


@pytest.mark.usefixtures("daemon")
def test_anything_else_is_refused(mps: Mps) -> None:
    assert mps("begin") == (1, "error: found 'begin', expected start or stop")


def test_a_machine_without_mps_is_told_so(mps: Mps) -> None:
    code, said = mps("start")
    assert code == 1
    assert said.startswith("error: found no nvidia-cuda-mps-control on PATH, expected it from")
