"""The load client against a stub endpoint: what it counts, and that it never waits."""

import asyncio
from random import Random

import pytest
from stub_endpoint import Stub, running

from muxrt.bench.client import EndpointError
from muxrt.bench.job import Api, Outcome, Progress, Status, Target
from muxrt.bench.report import Report, as_json, make_report
from muxrt.bench.run import Run, run, run_all
from muxrt.bench.table import make_table, notes
from muxrt.bench.text import PromptText
from muxrt.bench.watch import Blocks, ModelBlocks, parse_metrics
from muxrt.config.placement import Slo
from muxrt.errors import ConfigError
from muxrt.workload.spec import Lengths, PowerLaw, Traffic, Workload

METRICS = """# HELP muxrt_blocks_used Blocks held
# TYPE muxrt_blocks_used gauge
muxrt_blocks_used{{model="a",unit="u"}} {a}
muxrt_blocks_used{{model="b",unit="u"}} {b}
muxrt_blocks_quota{{model="a",unit="u"}} 10.0
muxrt_blocks_quota{{model="b",unit="u"}} 20.0
muxrt_blocks_borrowed{{model="a",unit="u"}} {lent}
muxrt_blocks_borrowed{{model="b",unit="u"}} 0.0
muxrt_preemptions_total{{model="a",unit="u",kind="swap"}} {preempted}
muxrt_preemptions_total{{model="a",unit="u",kind="recompute"}} 1.0
"""


def small(**changes: object) -> Workload:
    workload = {
        "duration_s": 0.5,
        "power_law": PowerLaw(alpha=1.0, rate_rps=60),
        "prompt": Lengths(mean_tokens=20),
        "output": Lengths(mean_tokens=5),
        "slo": Slo(ttft_s=5, tpot_s=1),
    }
    return Workload(**{**workload, **changes})  # type: ignore[arg-type]


def bench(stub: Stub, workload: Workload, **options: object) -> Report:
    return make_report(asyncio.run(_bench(stub, workload, options)))


async def _bench(stub: Stub, workload: Workload, options: dict[str, object]) -> Run:
    async with running(stub):
        target = Target(stub.url, **options)  # type: ignore[arg-type]
        return await run(target, workload, lambda _: None)


def test_every_request_is_answered_and_counted() -> None:
    report = bench(Stub(), small())
    assert report.total.requests == sum(row.requests for row in report.rows) > 10
    assert (report.total.failed, report.total.refused, report.total.attainment) == (0, 0, 1.0)
    assert report.total.output_tokens == 5 * report.total.requests
    assert report.errors == {}


@pytest.mark.parametrize("api", Api)
def test_both_routes_are_measured_from_the_first_text(api: Api) -> None:
    report = bench(Stub(first_s=0.05, token_s=0.01), small(), api=api)
    assert report.total.ttft_p50_s is not None and report.total.ttft_p50_s >= 0.06
    assert report.total.tpot_p50_s is not None and 0.009 < report.total.tpot_p50_s < 0.1


def test_prompts_are_cut_to_the_length_that_was_asked() -> None:
    report = bench(Stub(), small())
    assert report.total.prompt_tokens == 20 * report.total.requests


def test_the_request_is_greedy_streamed_and_as_long_as_asked() -> None:
    stub = Stub()
    bench(stub, small(), api_key="secret")
    body = stub.asked[-1]
    assert (body["temperature"], body["ignore_eos"], body["max_tokens"]) == (0, True, 5)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert body["key"] == "Bearer secret"


def test_without_ignore_eos_no_extension_is_sent() -> None:
    stub = Stub()
    bench(stub, small(), ignore_eos=False)
    assert "ignore_eos" not in stub.asked[-1]


@pytest.mark.parametrize(
    ("how", "failed", "error"),
    [
        ("500", True, "500: told to answer 500"),
        ("429", False, "429: told to answer 429"),
        ("cut", True, "ClientPayloadError"),
        ("error", True, "in the stream: out of luck"),
        ("silent end", True, "the stream ended without [DONE]"),
    ],
)
def test_what_goes_wrong_is_counted_by_kind(how: str, failed: bool, error: str) -> None:
    report = bench(Stub(breaks={"a": how}), small())
    a, b = report.rows
    assert (a.failed if failed else a.refused) == a.requests > 0
    assert (b.failed, b.refused, b.attainment) == (0, 0, 1.0)
    assert a.attainment == 0.0
    assert all(text.startswith(error) for text in report.errors)


def test_a_request_that_takes_too_long_fails() -> None:
    # The probe of one token is short enough, the answers of 200 tokens are not.
    workload = small(models=(Traffic(name="a"),), output=Lengths(mean_tokens=200))
    report = bench(Stub(first_s=0.0, token_s=0.01), workload, timeout_s=0.3)
    assert report.total.failed == report.total.requests
    assert list(report.errors) == ["no complete answer within 0.3 s"]


def test_the_loop_is_open() -> None:
    """Requests leave on time although no answer comes before all have left."""
    report = bench(Stub(first_s=0.6), small(duration_s=0.3))
    assert report.client_lag_p99_s < 0.2
    assert report.total.ttft_p99_s is not None and report.total.ttft_p99_s < 1.0


def test_lateness_of_the_client_counts_as_waiting() -> None:
    late = Outcome("a", due_s=0.0, status=Status.OK, lag_s=0.4, ttft_s=0.5, last_s=0.5, e2e_s=0.5)
    report = make_report(Run(small(models=(Traffic(name="a"),)), [late], Blocks(), 1))
    assert "this client sent late (p99 0.40 s)" in "\n".join(notes(report))


def test_cutting_a_run_short_keeps_what_is_done() -> None:
    async def cut() -> Report:
        async with running(Stub(token_s=0.0)) as stub:
            workload = small(duration_s=30.0, power_law=PowerLaw(alpha=0, rate_rps=20))
            enough = asyncio.Event()

            def changed(progress: Progress) -> None:
                if progress.done >= 5:
                    enough.set()

            task = asyncio.create_task(run(Target(stub.url), workload, changed))
            await enough.wait()
            task.cancel()
            return make_report(await task)

    report = asyncio.run(cut())
    assert report.total.requests >= 5 and report.num_not_sent > 100
    assert any(line.startswith("cut short:") for line in notes(report))


def test_blocks_are_read_from_muxrt_servers() -> None:
    before = METRICS.format(a=1.0, b=2.0, lent=0.0, preempted=3.0)
    during = METRICS.format(a=14.0, b=9.0, lent=4.0, preempted=5.0)
    after = METRICS.format(a=0.0, b=0.0, lent=0.0, preempted=6.0)
    report = bench(Stub(metrics=[before, during, after]), small(duration_s=1.2))
    blocks = report.rows[0].blocks
    assert blocks is not None
    assert (blocks.used, blocks.quota, blocks.borrowed, blocks.preempted) == (14, 10, 4, 3)
    assert report.total.blocks == ModelBlocks(used=23, quota=30, borrowed=4, preempted=3)


def test_other_servers_have_no_block_columns() -> None:
    report = bench(Stub(), small())
    assert report.total.blocks is None
    assert [str(column.header).split()[0] for column in make_table(report).columns] == [
        "model",
        "requests",
        "failed",
        "TTFT",
        "TPOT",
        "in",
        "tokens",
    ]


def test_a_restarted_unit_counts_preemptions_anew() -> None:
    blocks = Blocks()
    for count in (10.0, 12.0, 1.0):
        blocks.add(parse_metrics(METRICS.format(a=0, b=0, lent=0, preempted=count)))
    assert blocks.models["a"].preempted == 2


def test_several_endpoints_share_the_models_out() -> None:
    """Each model is asked for where it is listed; blocks of all servers add up."""
    one = Stub(models=("a",), metrics=[METRICS.format(a=1.0, b=2.0, lent=0.0, preempted=0.0)])
    two = Stub(models=("b", "a"), metrics=[METRICS.format(a=3.0, b=4.0, lent=0.0, preempted=0.0)])

    async def both() -> Run:
        async with running(one), running(two):
            targets = [Target(one.url), Target(two.url)]
            return await run_all(targets, small(), lambda _: None)

    report = make_report(asyncio.run(both()))
    assert (report.total.failed, report.total.attainment) == (0, 1.0)
    assert {body["model"] for body in one.asked} == {"a"}
    assert {body["model"] for body in two.asked} == {"b"}
    assert report.total.blocks is not None and report.total.blocks.used == 1 + 2 + 3 + 4


def test_the_report_is_plain_data() -> None:
    data = as_json(bench(Stub(), small()))
    assert data["total"]["slo"] is None and data["rows"][0]["slo"] == {"ttft_s": 5, "tpot_s": 1}
    assert data["rows"][0]["model"] == "a"


def test_nobody_there() -> None:
    with pytest.raises(EndpointError, match="http://127.0.0.1:9 cannot be reached"):
        asyncio.run(run(Target("http://127.0.0.1:9/v1"), small(), lambda _: None))


def test_a_model_that_is_not_served() -> None:
    with pytest.raises(ConfigError, match="asks for 'c', the endpoint serves: a, b"):
        bench(Stub(), small(models=(Traffic(name="c"),)))


def test_a_model_that_does_not_answer_is_named_before_the_load_starts() -> None:
    async def ask() -> None:
        async with running(Stub(models=("a",), first_s=0.5)) as stub:
            await run(Target(stub.url, timeout_s=0.1), small(), lambda _: None)

    with pytest.raises(EndpointError, match="a does not answer a first request"):
        asyncio.run(ask())


def test_text_is_as_long_as_asked_and_repeats_with_the_seed() -> None:
    text = PromptText()
    for num_chars in (1, 17, 5000, 3_000_000):
        assert len(text.cut(num_chars, Random(1))) == num_chars
    assert text.cut(99, Random(1)) == text.cut(99, Random(1)) != text.cut(99, Random(2))
