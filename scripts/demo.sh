#!/usr/bin/env bash
# Three models behind one endpoint, under real traffic. Arguments go to `muxrt demo`:
# bash scripts/demo.sh --keep leaves the endpoint up.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/_env.sh"

muxrt_say "environment"
muxrt_env
# The last command: signals reach it, and it stops what it started.
exec python -m muxrt demo "$ROOT/configs/demo.yaml" "$@"
