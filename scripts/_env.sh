# Sourced by test.sh and demo.sh: the virtual environment both run in.
#
#   muxrt_env    makes it, or reuses it while it is current, and puts it first on PATH.
#
# MUXRT_VENV    its folder (default: .venv in the repository)
# MUXRT_PYTHON  the Python it is made with (default: the first usable one of CANDIDATES)

MUXRT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CANDIDATES="python3.12 python3.11 python3 python"

muxrt_say() { printf '==> %s\n' "$*"; }

muxrt_fail() {
    printf 'error: %s\n' "$*" >&2
    return 1
}

muxrt_env() {
    local venv="${MUXRT_VENV:-$MUXRT_ROOT/.venv}"
    mkdir -p "$venv" && venv="$(cd "$venv" && pwd)" || return 1
    # Two set-ups at once would break each other. The lock is the folder itself: no file to leave
    # behind, and the kernel drops it when this subshell and its pip have ended, however they end.
    (
        if command -v flock >/dev/null; then
            flock -n 9 || { muxrt_say "waiting for another set-up of $venv" && flock 9; }
        fi
        _muxrt_set_up "$venv"
    ) 9<"$venv" || return 1
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    unset PYTHONHOME
}

# The stamps are written last, so an interrupted set-up is never mistaken for a finished one.
_muxrt_set_up() {
    local venv="$1" python="$1/bin/python" stamp started=$SECONDS
    if ! stamp="$(_muxrt_stamp "$python" requirements.lock)" ||
        [ "$stamp" != "$(cat "$venv/dependencies.stamp" 2>/dev/null)" ]; then
        _muxrt_install_dependencies "$venv" || return 1
    fi
    stamp="$(_muxrt_stamp "$python" setup.py pyproject.toml)" || return 1
    if [ "$stamp" != "$(cat "$venv/project.stamp" 2>/dev/null)" ]; then
        muxrt_say "installing muxrt, editable"
        _muxrt_pip "$python" --no-deps --no-build-isolation --editable "$MUXRT_ROOT" || return 1
        printf '%s\n' "$stamp" >"$venv/project.stamp"
    fi
    stamp="$(_muxrt_stamp "$python" requirements.lock "$MUXRT_ROOT"/kernels/*.py)" || return 1
    if [ "$stamp" != "$(cat "$venv/kernels.stamp" 2>/dev/null)" ]; then
        muxrt_say "compiling the kernels (half a minute, once per version of them)"
        "$python" -c 'from muxrt.kernels import cpu; cpu.warm_up()' || return 1
        printf '%s\n' "$stamp" >"$venv/kernels.stamp"
    fi
    muxrt_say "environment $venv is current ($((SECONDS - started)) s)"
}

_muxrt_install_dependencies() {
    local venv="$1" python="$1/bin/python" base
    base="$(_muxrt_find_python)" || return 1
    # `venv --clear` empties the folder: never do that to a folder that was not ours.
    if [ -n "$(ls -A "$venv")" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        muxrt_fail "$venv has files but is no virtual environment: set MUXRT_VENV to another folder"
        return 1
    fi
    muxrt_say "making $venv with $("$base" -V)"
    "$base" -m venv --clear "$venv" || return 1
    muxrt_say "installing requirements.lock (minutes the first time)"
    _muxrt_pip "$python" --requirement "$MUXRT_ROOT/requirements.lock" || return 1
    _muxrt_stamp "$python" requirements.lock >"$venv/dependencies.stamp"
}

_muxrt_pip() {
    local python="$1"
    shift
    "$python" -m pip install -qq --disable-pip-version-check "$@" ||
        muxrt_fail "pip could not install: $*"
}

# A stamp changes with the Python of the environment, the checkout and the given files.
_muxrt_stamp() {
    local python="$1"
    shift
    (cd "$MUXRT_ROOT" && "$python" - "$@") 2>/dev/null <<'PY'
import hashlib, pathlib, sys

stamp = hashlib.sha256(f"{sys.version} {sys.prefix}".encode())
for name in sys.argv[1:]:
    stamp.update(b"\0" + pathlib.Path(name).read_bytes())
if "setup.py" in sys.argv:  # an editable install points at one checkout
    stamp.update(str(pathlib.Path.cwd()).encode())
print(stamp.hexdigest())
PY
}

# A candidate must run: a pyenv shim exists for every version that any environment has.
_muxrt_find_python() {
    local python
    for python in ${MUXRT_PYTHON:-$CANDIDATES}; do
        if "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1; then
            command -v "$python"
            return
        fi
    done
    muxrt_fail "Python 3.11 or newer with its venv module is needed, tried: ${MUXRT_PYTHON:-$CANDIDATES}." \
        "Install one (Debian: apt install python3 python3-venv) or set MUXRT_PYTHON to its path."
}
