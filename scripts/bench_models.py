"""The folders that benchmarks serve: random weights in the shapes of train_demo_models.py."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

SCRIPT = Path(__file__).with_name("train_demo_models.py")
# Weights are the same for the same seed, so a folder that is there is reused.
FOLDER = Path(tempfile.gettempdir()) / f"muxrt-bench-models-{os.getuid()}"


def preset_folders(names: Iterable[str], under: Path = FOLDER) -> list[Path]:
    """A folder per preset, written where it is missing."""
    return [random_folder(under / name, "--preset", name) for name in names]


def random_folder(folder: Path, *shape: str) -> Path:
    """`folder` with random weights; `shape` are options of `train_demo_models.py random`."""
    if not (folder / "model.safetensors").is_file():
        command = [sys.executable, str(SCRIPT), "random", "--out", str(folder), *shape]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder
