#!/usr/bin/env bash
# NVIDIA MPS, which `lanes.kind: mps` needs: one daemon shares the GPUs among the processes of all
# lanes. The folder of its pipe must be the same for whoever starts muxrt.
#
#   scripts/mps.sh start     a daemon, unless one runs
#   scripts/mps.sh stop      end it; processes that still use it lose their GPU
#
# CUDA_MPS_PIPE_DIRECTORY  where its pipe is (default: /tmp/nvidia-mps)
# CUDA_MPS_LOG_DIRECTORY   where it logs (default: /tmp/nvidia-mps-log)
set -euo pipefail

export CUDA_MPS_PIPE_DIRECTORY="${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}"
export CUDA_MPS_LOG_DIRECTORY="${CUDA_MPS_LOG_DIRECTORY:-/tmp/nvidia-mps-log}"
CONTROL=nvidia-cuda-mps-control

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_running() { [ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ] && ask get_server_list; }

# A daemon that died leaves its pipe: asking it must not wait for ever.
ask() { timeout 5 "$CONTROL" <<<"$1" >/dev/null 2>&1; }

command -v "$CONTROL" >/dev/null ||
    fail "found no $CONTROL on PATH, expected it from the NVIDIA driver (in a container: from its toolkit)"
case "${1:-}" in
start)
    is_running && {
        echo "MPS already serves $CUDA_MPS_PIPE_DIRECTORY"
        exit 0
    }
    mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
    "$CONTROL" -d || fail "$CONTROL did not start: see $CUDA_MPS_LOG_DIRECTORY/control.log"
    is_running || fail "MPS does not answer: see $CUDA_MPS_LOG_DIRECTORY/control.log"
    echo "MPS serves $CUDA_MPS_PIPE_DIRECTORY"
    ;;
stop)
    is_running || {
        echo "no MPS serves $CUDA_MPS_PIPE_DIRECTORY"
        exit 0
    }
    ask quit || fail "MPS did not end: see $CUDA_MPS_LOG_DIRECTORY/control.log"
    echo "MPS ended"
    ;;
*)
    fail "found '${1:-}', expected start or stop"
    ;;
esac
