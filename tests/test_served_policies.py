"""`slo` behind the endpoint: a real server and its unit process give the tokens that adbs gives."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
import pytest
from real_server import real_config, real_server

from muxrt.config.placement import MIB, Scheduling, Slo
from muxrt.config.serve import ServeConfig

MODELS = ("one", "two")
NUM_REQUESTS = 24


def under(policy: str, folder: Path) -> ServeConfig:
    """Two tiny models in one unit, with targets that waiting requests miss."""
    plain = real_config(folder, {"main": list(MODELS)}, kv_bytes=4 * MIB)
    scheduling = Scheduling(policy=policy, prefill_tokens=32, max_sequences=4)  # type: ignore[arg-type]
    return msgspec.structs.replace(
        plain,
        models=tuple(msgspec.structs.replace(m, slo=Slo(0.02, 0.02)) for m in plain.models),
        units=tuple(msgspec.structs.replace(u, scheduling=scheduling) for u in plain.units),
    )


def answers(config: ServeConfig) -> list[str]:
    """Greedy answers to requests that come all at once."""

    def ask(url: str, number: int) -> str:
        asked = {
            "model": MODELS[number % 2],
            "prompt": [3 + (number * 7 + place) % 90 for place in range(5 + number)],
            "max_tokens": 8,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        request = Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
        with urlopen(request, timeout=120) as response:
            return str(json.load(response)["choices"][0]["text"])

    with real_server(config) as server, ThreadPoolExecutor(NUM_REQUESTS) as pool:
        texts = list(pool.map(lambda number: ask(server.url, number), range(NUM_REQUESTS)))
        server.check_nothing_leaked()
    return texts


@pytest.mark.slow
def test_served_tokens_are_the_same(tmp_path: Path) -> None:
    ours, theirs = (answers(under(policy, tmp_path / policy)) for policy in ("slo", "adbs"))
    assert ours == theirs
    assert len(set(ours)) > 1
