"""The serve configuration: what is read, and the one error that a wrong file gets."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxrt.config.document import KeyedError, dotted
from muxrt.config.load import dump, load
from muxrt.config.placement import (
    Lanes,
    Memory,
    Mesh,
    ModelSpec,
    Scheduling,
    Slo,
    UnitModel,
    UnitSpec,
)
from muxrt.config.schema import parse_bytes
from muxrt.config.serve import (
    ApiKeys,
    Endpoint,
    ServeConfig,
    check_references,
    stage_problems,
)
from muxrt.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
GOOD = """\
endpoint:
  port: 8001
models:
  - name: a
    path: folders/a
    slo: {ttft_s: 1, tpot_s: 0.1}
  - {name: b, path: /models/b, rate_rps: 2}
units:
  - name: main
    memory: {kv_bytes: 64MiB}
    models:
      - {name: a, quota: 0.7}
      - {name: b, quota: 0.3}
"""

# (what is replaced, by what, the whole error after the file's name)
BROKEN = {
    "misspelt key": (
        "kv_bytes:",
        "kv_byte:",
        ":10: units[0].memory.kv_byte: unknown key; did you mean kv_bytes?; allowed here: kv_bytes,"
        " weight_bytes, swap_bytes, graph_bytes, planes_per_block, plane_tokens",
    ),
    "unknown top-level key": (
        "endpoint:",
        "server:",
        ":1: server: unknown key; allowed here: models, units, endpoint, routing, traffic, admin,"
        " replan",
    ),
    "size without a unit we know": (
        "64MiB",
        "64 megs",
        ":10: units[0].memory.kv_bytes: found '64 megs', expected a size such as 64MiB or 1.5GiB,"
        " or a whole number of bytes of at least 1",
    ),
    "size of zero": (
        "64MiB",
        "0",
        ":10: units[0].memory.kv_bytes: found 0, expected a size such as 64MiB or 1.5GiB,"
        " or a whole number of bytes of at least 1",
    ),
    "port as text": (
        "8001",
        "http",
        ":2: endpoint.port: found 'http', expected a whole number of at least 0 and at most 65535",
    ),
    "port too high": (
        "8001",
        "80010",
        ":2: endpoint.port: found 80010, expected a whole number of at least 0 and at most 65535",
    ),
    "yes is not a port": (
        "8001",
        "yes",
        ":2: endpoint.port: found true, expected a whole number of at least 0 and at most 65535",
    ),
    "name is missing": (
        "  - name: a\n    path",
        "  - path",
        ":4: models[0]: name is missing in models[0], expected text",
    ),
    "path is null": (
        "folders/a",
        "",
        ":4: models[0]: found none of path, preset and sizes, expected exactly one of them",
    ),
    "two sources of a shape": (
        "folders/a",
        "folders/a\n    preset: llama-7b",
        ":4: models[0]: found path and preset of path, preset and sizes,"
        " expected exactly one of them",
    ),
    "negative target": (
        "ttft_s: 1",
        "ttft_s: -1",
        ":6: models[0].slo.ttft_s: found -1, expected a number of seconds above 0",
    ),
    "infinite rate": (
        "rate_rps: 2",
        "rate_rps: .inf",
        ":7: models[1].rate_rps: found inf, expected a number above 0",
    ),
    "unsupported dtype": (
        "rate_rps: 2",
        "dtype: float8",
        ":7: models[1].dtype: found 'float8', expected one of auto, bfloat16, float32;"
        " did you mean float32?",
    ),
    "unknown policy": (
        "memory:",
        "scheduling: {policy: round_robin}\n    memory:",
        ":10: units[0].scheduling.policy: found 'round_robin', expected one of adbs, fcfs,"
        " round-robin, slo; did you mean round-robin?",
    ),
    "a policy that goes by targets, and a model without": (
        "memory:",
        "scheduling: {policy: slo}\n    memory:",
        ":10: units[0].scheduling.policy: slo goes by targets, and b has none: give it"
        " slo: {ttft_s: 1.0, tpot_s: 0.1}, or use adbs",
    ),
    "a mapping where a list is due": (
        "      - {name: a, quota: 0.7}\n      - {name: b, quota: 0.3}",
        "      a: 0.7",
        ":11: units[0].models: found a mapping, expected a list,"
        " each item a mapping with name, role, quota, traffic, sm_pct, expected",
    ),
    "a name where a mapping is due": (
        "{name: b, quota: 0.3}",
        "b",
        ":13: units[0].models[1]: found 'b', expected a mapping with name, role, quota,"
        " traffic, sm_pct, expected",
    ),
    "unknown model in a unit": (
        "{name: b, quota: 0.3}",
        "{name: c}",
        ":13: units[0].models[1].name: found 'c', expected one of the models of this file: a, b",
    ),
    "model in no unit": (
        "      - {name: b, quota: 0.3}\n",
        "",
        ":7: models[1].name: 'b' is in no unit: add {name: b} to the models of a unit"
        " or remove it here",
    ),
    "model twice": (
        "name: b, path",
        "name: a, path",
        ":7: models[1].name: 'a' is already the name of models[0]",
    ),
    "model twice in a unit": (
        "{name: b, quota: 0.3}",
        "{name: a}",
        ":13: units[0].models[1].name: 'a' is already units[0].models[0]",
    ),
    "quotas above one": (
        "quota: 0.7",
        "quota: 0.8",
        ":11: units[0].models: the quotas add up to 0.8 + 0.3 = 1.1, expected at most 1 in all",
    ),
    "quota in percent": (
        "quota: 0.7",
        "quota: 70",
        ":12: units[0].models[0].quota: found 70, expected a number above 0 and at most 1",
    ),
    "lanes wider than the mesh": (
        "memory:",
        "mesh: {cores: [0, 1]}\n    lanes: {split: [2, 1]}\n    memory:",
        ":11: units[0].lanes.split: the lanes need 3 cores and mesh.cores lists 2:"
        " expected a sum of at most 2",
    ),
    "core twice": (
        "memory:",
        "mesh: {cores: [0, 0]}\n    memory:",
        ":10: units[0].mesh.cores: core 0 is already in units[0].mesh.cores",
    ),
    "prefills that nobody goes on with": (
        "{name: a, quota: 0.7}",
        "{name: a, role: prefill}",
        ":12: units[0].models[0].role: a has a prefill unit and no decode unit",
    ),
    "stages that do not come out": (
        "memory:",
        "mesh: {gpus: [0, 1, 2], pp: 2}\n    memory:",
        ":10: units[0].mesh.pp: found 2, expected a divisor of its 3 gpus",
    ),
    "stages of nothing": (
        "memory:",
        "mesh: {pp: 2}\n    memory:",
        ":10: units[0].mesh.pp: found 2 stages and no gpus, expected them listed",
    ),
    "a machine too few": (
        "memory:",
        "mesh: {gpus: [0, 1], pp: 2, nodes: [0]}\n    memory:",
        ":10: units[0].mesh.nodes: found 1, expected one for each stage, and no node",
    ),
    "marks the wrong way round": (
        "units:",
        "routing: {policy: splitwise, return_batches: 5}\nunits:",
        ":8: routing.return_batches: found 5, expected at most borrow_batches, which is 4",
    ),
    "memory that is more than full": (
        "units:",
        "routing: {policy: splitwise, borrow_kv: 90}\nunits:",
        ":8: routing.borrow_kv: found 90, expected a number above 0 and at most 1",
    ),
    "a routing that nobody has": (
        "units:",
        "routing: {policy: splitwize}\nunits:",
        ":8: routing.policy: found 'splitwize', expected one of distserve, splitwise;"
        " did you mean splitwise?",
    ),
    "marks that nobody reads": (
        "units:",
        "routing: {borrow_kv: 0.8}\nunits:",
        ":8: routing.borrow_kv: policy distserve borrows no units: expected policy: splitwise"
        " beside it, or no such key",
    ),
    "swap without room": (
        "memory:",
        "scheduling: {preempt: swap}\n    memory:",
        ":10: units[0].scheduling.preempt: swap needs room:"
        " set units[0].memory.swap_bytes, such as 64MiB",
    ),
    "two sources of keys": (
        "port: 8001",
        "api_keys: {file: a, env: B}",
        ":2: endpoint.api_keys: found both of file and env, expected exactly one of them",
    ),
    "units and the short form": (
        "units:",
        "kv_bytes: 1GiB\nunits:",
        ":8: kv_bytes: with units, each has its own: move it to units[i].memory.kv_bytes",
    ),
    "neither units nor the short form": (
        GOOD[GOOD.index("units:") :],
        "",
        ":1: neither units nor kv_bytes is there, expected units (a list), or kv_bytes such as"
        " 64MiB: the KV memory of one unit with every model on every core",
    ),
    "short form with a wrong size": (
        GOOD[GOOD.index("units:") :],
        "kv_bytes: much\n",
        ":8: kv_bytes: found 'much', expected a size such as 64MiB or 1.5GiB,"
        " or a whole number of bytes of at least 1",
    ),
    "the same key twice": (
        "  port: 8001",
        "  port: 8001\n  port: 8002",
        ":3: endpoint.port: written twice, first on line 2",
    ),
    "no models": (
        GOOD[GOOD.index("models:") : GOOD.index("units:")],
        "models: []\n",
        ":3: models: found an empty list, expected at least one model",
    ),
    "not YAML": (
        "models:\n  - name: a",
        "models:\n  - name: [a",
        ":5: not YAML: expected ',' or ']', but got ':'",
    ),
    "a tab": (
        "  port: 8001",
        "\tport: 8001",
        ":2: not YAML: found character '\\t' that cannot start any token",
    ),
    "an empty file": (
        GOOD,
        "",
        ":1: found nothing, expected a mapping with models, units, endpoint, routing,"
        " traffic, admin, replan",
    ),
    "a list": (
        GOOD,
        "- a\n- b\n",
        ":1: found a list, expected a mapping with models, units, endpoint, routing,"
        " traffic, admin, replan",
    ),
}


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_file_gets_one_error(case: str, tmp_path: Path) -> None:
    old, new, expected = BROKEN[case]
    assert GOOD.count(old) >= 1
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.message == f"{path}{expected}"


def test_a_good_file(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD))
    assert config.endpoint == Endpoint(port=8001)
    assert config.models == (
        ModelSpec(name="a", path=str(tmp_path / "folders/a"), slo=Slo(ttft_s=1, tpot_s=0.1)),
        ModelSpec(name="b", path="/models/b", rate_rps=2),
    )
    (unit,) = config.units
    assert (unit.name, unit.memory.kv_bytes) == ("main", 64 << 20)
    assert unit.models == (UnitModel(name="a", quota=0.7), UnitModel(name="b", quota=0.3))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_load(path: Path) -> None:
    folders = {Path(model.path or "").name for model in load(path).models}
    assert folders <= {"pydoc-s", "pydoc-m", "pydoc-l"}


def test_stages_cannot_be_run_yet() -> None:
    memory = Memory(kv_bytes=1)
    roles: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
    units = tuple(
        UnitSpec(name=role, models=(UnitModel(name="a", role=role),), memory=memory)
        for role in roles
    )
    staged = UnitSpec(
        name="c", models=(UnitModel(name="a"),), memory=memory, mesh=Mesh(gpus=(0, 1), pp=2)
    )
    check_references(ServeConfig(models=(ModelSpec(name="a", path="a"),), units=(*units, staged)))
    found = [problem.text for problem in stage_problems((*units, staged), "it")]
    assert found == [
        "found 2, expected 1: it has no pipeline stages, such a placement is a plan only",
    ]


def test_the_short_form_is_one_unit_with_every_model(tmp_path: Path) -> None:
    text = "kv_bytes: 1.5GiB\nmodels: [{name: a, path: a}, {name: b, path: b}]\n"
    (unit,) = load(write(tmp_path, text)).units
    names = (UnitModel(name="a"), UnitModel(name="b"))
    assert unit == UnitSpec(name="main", models=names, memory=Memory(kv_bytes=3 << 29))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        load(tmp_path / "nowhere.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        load(path)


def test_key_files_are_found_beside_the_yaml(tmp_path: Path) -> None:
    keys = "api_keys: {file: keys.txt, isolate: true}"
    config = load(write(tmp_path, GOOD.replace("port: 8001", keys)))
    assert config.endpoint.api_keys == ApiKeys(file=str(tmp_path / "keys.txt"), isolate=True)


def test_defaults_can_be_shared_with_an_anchor(tmp_path: Path) -> None:
    text = GOOD.replace("slo: {", "slo: &usual {").replace("rate_rps: 2", "slo: {<<: *usual}")
    config = load(write(tmp_path, text))
    assert config.models[0].slo == config.models[1].slo == Slo(ttft_s=1, tpot_s=0.1)


def test_an_anchor_inside_itself_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("models:", "models: &m", 1).replace("slo: {", "slo: {x: *m, ")
    with pytest.raises(ConfigError, match="nested deeper than"):
        load(write(tmp_path, text))


def test_numbers_with_exponents_are_numbers(tmp_path: Path) -> None:
    config = load(write(tmp_path, GOOD.replace("rate_rps: 2", "rate_rps: 5e-1")))
    assert config.model("b").rate_rps == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        (" 10 kb ", 10_000),
        ("7B", 7),
        ("64", None),
        ("MiB", None),
        ("-1MiB", None),
        ("1e3MiB", None),
    ],
)
def test_sizes(text: str, expected: int | None) -> None:
    assert parse_bytes(text) == expected


def test_keys_are_shown_as_people_write_them() -> None:
    assert dotted(("units", 0, "memory", "kv_bytes")) == "units[0].memory.kv_bytes"
    assert KeyedError((), "empty").message == "empty"


NAMES = ("a", "b", "c")
seconds = st.floats(1e-6, 1e6)
counts = st.integers(1, 1 << 40)
models = st.builds(
    ModelSpec,
    name=st.none(),
    path=st.from_regex(r"/[a-z ü/.:#'-]{1,20}", fullmatch=True).map(lambda path: str(Path(path))),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    max_model_len=st.none() | counts,
    rate_rps=seconds,
    slo=st.none() | st.builds(Slo, ttft_s=seconds, tpot_s=seconds),
    queue_timeout_s=st.none() | seconds,
    max_queue=st.integers(0, 9999),
)
memories = st.builds(
    Memory,
    kv_bytes=counts,
    swap_bytes=counts,
    graph_bytes=counts,
    planes_per_block=st.none() | st.integers(1, 16),
    plane_tokens=st.integers(1, 64),
)
schedulings = st.builds(
    Scheduling,
    policy=st.sampled_from(["fcfs", "round-robin", "adbs"]),
    quota_period_s=st.floats(0, 100),
    prefix_reuse=st.booleans(),
    preempt=st.sampled_from(["auto", "swap", "recompute"]),
)
meshes = st.builds(Mesh, cores=st.none())
lanes = st.builds(
    Lanes,
    kind=st.sampled_from(["cores", "processes"]),
    split=st.none() | st.lists(st.integers(1, 8), min_size=1).map(tuple),
    depth=st.integers(1, 4),
)
endpoints = st.builds(
    Endpoint,
    host=st.sampled_from(["127.0.0.1", "::", "0.0.0.0", "yes", "1e3"]),
    port=st.integers(0, 65535),
    api_keys=st.none() | st.builds(ApiKeys, file=st.none(), env=st.just("KEYS")),
    max_body_bytes=counts,
    drain_s=st.floats(0, 1e4),
)


@st.composite
def configs(draw: st.DrawFn) -> ServeConfig:
    """Any valid configuration: every model in at least one unit."""
    names = NAMES[: draw(st.integers(1, 3))]
    num_units = draw(st.integers(1, 3))
    quota = st.none() | st.floats(1e-3, 1 / 3)
    units = tuple(
        UnitSpec(
            name=f"unit {index}",
            models=tuple(UnitModel(name=name, quota=draw(quota)) for name in names),
            memory=draw(memories),
            mesh=draw(meshes),
            lanes=draw(lanes),
            scheduling=draw(schedulings),
        )
        for index in range(num_units)
    )
    specs = tuple(_named(draw(models), name) for name in names)
    return ServeConfig(models=specs, units=units, endpoint=draw(endpoints))


def _named(spec: ModelSpec, name: str) -> ModelSpec:
    fields = {field: getattr(spec, field) for field in spec.__struct_fields__}
    return ModelSpec(**{**fields, "name": name})


@given(config=configs())
@settings(deadline=None)
def test_what_is_dumped_loads_as_it_was(
    config: ServeConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_references(config)
    path = tmp_path_factory.mktemp("config") / "serve.yaml"
    path.write_text(dump(config))
    assert load(path) == config


def test_a_dump_says_only_what_is_not_default(tmp_path: Path) -> None:
    text = dump(load(write(tmp_path, GOOD)))
    assert "endpoint:\n  port: 8001\n" in text and "scheduling" not in text
