#!/usr/bin/env bash
# Everything that is checked before a change lands. Arguments go to pytest: bash scripts/test.sh -k quota
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_env.sh

stage() {
    local name="$1" started=$SECONDS
    shift
    muxrt_say "$name: $*"
    "$@" || { muxrt_fail "stage '$name' failed after $((SECONDS - started)) s" || exit 1; }
    muxrt_say "$name: passed in $((SECONDS - started)) s"
}

stage environment muxrt_env
stage format ruff format --check .
stage lint ruff check .
stage types mypy
# Two at a time, as one alone leaves half of two cores idle. A file's tests share what they set up.
muxrt_say "tests: python -m pytest -n 2 --dist loadfile $*"
exec python -m pytest -n 2 --dist loadfile "$@" # the last stage: pytest's closing line ends the output
