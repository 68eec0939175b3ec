"""What an endpoint says in /metrics that its units have computed."""

from collections.abc import Mapping
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from muxrt.core import Phase
from muxrt.engine.messages import BatchStats

NAMES = ("muxrt_batches_total", "muxrt_batch_tokens_total", "muxrt_batch_seconds_total")
TIMEOUT_S = 5.0

Batches = Mapping[tuple[str, Phase], BatchStats]  # by model and phase


def read_batches(url: str) -> Batches:
    """Counts of the endpoint at `url` since it started; each model is in one unit only."""
    with urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as response:
        text = response.read().decode()
    values: dict[tuple[str, Phase], dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in NAMES:
                key = (sample.labels["model"], Phase(sample.labels["phase"]))
                values.setdefault(key, {})[sample.name] = sample.value
    found = {}
    for key in sorted(values, key=lambda key: (key[0], key[1].value)):
        batches, tokens, seconds = (values[key][name] for name in NAMES)
        found[key] = BatchStats(*key, int(batches), int(tokens), seconds)
    return found


def batches_since(before: Batches, after: Batches) -> dict[tuple[str, Phase], BatchStats]:
    """What was computed between two readings."""
    found = {}
    for key, now in after.items():
        old = before.get(key) or BatchStats(*key)
        found[key] = BatchStats(
            *key, now.batches - old.batches, now.tokens - old.tokens, now.seconds - old.seconds
        )
    return found
