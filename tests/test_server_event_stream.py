"""Streams of events: the quick way says what the slow one says, and a slow client is waited for."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import uvloop
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from scripted_unit import WAIT_S, on_loop
from tiny_folder import byte_level, sentencepiece_like

from muxrt.core import FinishReason, Output, TokenLogprobs
from muxrt.server.answers import NUL, ChatDialect, CompletionDialect, Writer, split_event
from muxrt.server.event_stream import (
    MAX_UNSENT_BYTES,
    MAX_UNSENT_EVENTS,
    EventStream,
    Outbox,
)
from muxrt.server.generation import Choice, Delta
from muxrt.server.tokenizer import Tokenizer

TOKENIZERS = {
    "byte-level": Tokenizer(byte_level(), is_byte_level=True),
    "sentencepiece": Tokenizer(sentencepiece_like(), is_byte_level=False),
}
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)
STEPS = st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=3), max_size=20)


# -- what is said ----------------------------------------------------------------------------


@KINDS
@given(steps=STEPS)
def test_plain_outputs_read_the_same_either_way(kind: str, steps: list[list[int]]) -> None:
    careful, quick = Choice(0, TOKENIZERS[kind]), Choice(0, TOKENIZERS[kind])
    for number, tokens in enumerate(steps):
        output = Output(1, tuple(tokens), cached_tokens=number % 3)
        expected = careful.take(output, float(number))
        text = quick.take_plain(output, float(number))
        if text is None:
            assert quick.take(output, float(number)) == expected
        else:
            assert expected == Delta(json.loads(b'"' + text + b'"'), None, None)
    end = Output(1, (), FinishReason.LENGTH)
    assert quick.take(end, 99.0) == careful.take(end, 99.0)
    for name in ("num_tokens", "cached_tokens", "first_s", "last_s"):
        assert getattr(quick, name) == getattr(careful, name)


def began(**options: object) -> Choice:
    """A choice whose first token has come."""
    choice = Choice(0, TOKENIZERS["byte-level"], **options)  # type: ignore[arg-type]
    choice.take(Output(1, WORD), 0.0)
    return choice


WORD = tuple(byte_level().encode("fox", add_special_tokens=False).ids)
SMILE = byte_level().encode("\U0001f600", add_special_tokens=False).ids
SPECIAL = byte_level().token_to_id("<|eos|>")


def test_most_outputs_are_plain() -> None:
    assert began().take_plain(Output(1, WORD), 1.0) == b"fox"


def test_json_is_escaped() -> None:
    odd = '"\\\n\x7f\u00e9'
    ids = byte_level().encode(odd, add_special_tokens=False).ids
    choice, said = began(), ""
    for token in ids:
        text = choice.take_plain(Output(1, (token,)), 1.0)
        said += (
            choice.take(Output(1, (token,)), 1.0).text
            if text is None
            else json.loads(b'"' + text + b'"')
        )
    assert said == odd


@pytest.mark.parametrize(
    "output",
    [
        Output(1, WORD, FinishReason.LENGTH),
        Output(1, WORD, None, (TokenLogprobs(WORD[0], -1.0),)),
        Output(1, (SPECIAL,)),
        Output(1, (*WORD, SMILE[0])),
        Output(1),
    ],
    ids=["last", "scored", "special", "half", "none"],
)
def test_what_needs_care_is_not_taken(output: Output) -> None:
    choice = began()
    assert choice.take_plain(output, 1.0) is None
    assert (choice.num_tokens, choice.last_s) == (len(WORD), 0.0)


def test_half_a_character_keeps_the_next_token_on_the_careful_way() -> None:
    choice = began()
    choice.take(Output(1, (SMILE[0],)), 1.0)
    assert choice.take_plain(Output(1, WORD), 1.0) is None


def test_the_first_output_is_never_plain() -> None:
    assert Choice(0, TOKENIZERS["byte-level"]).take_plain(Output(1, WORD), 1.0) is None


@pytest.mark.parametrize("options", [{"stops": ("x",)}, {"is_scored": True}])
def test_stops_and_scores_need_care(options: dict[str, object]) -> None:
    assert began(**options).take_plain(Output(1, WORD), 1.0) is None


@pytest.mark.parametrize("dialect", [ChatDialect, CompletionDialect])
@pytest.mark.parametrize("has_usage", [False, True])
@given(text=st.text(max_size=8))
def test_a_frame_around_a_text_is_its_event(
    dialect: type[ChatDialect] | type[CompletionDialect], has_usage: bool, text: str
) -> None:
    writer = Writer(dialect(TOKENIZERS["byte-level"]), "id", 7, "a\0model")

    def event(delta: Delta) -> bytes:
        return writer.usage_event(None, 3, delta) if has_usage else writer.event(3, delta)

    frame = split_event(event(NUL))
    inside = json.dumps(text, ensure_ascii=False).encode(errors="replace")[1:-1]
    assert json.loads((frame.before + inside + frame.after)[6:]) == json.loads(
        event(Delta(text, None, None))[6:]
    )


# -- how it is sent --------------------------------------------------------------------------

Handler = Callable[[EventStream], Awaitable[None]]


@asynccontextmanager
async def connection(handler: Handler, version: str = "1.1") -> AsyncIterator[asyncio.StreamReader]:
    """A client that has asked a server whose answer `handler` writes."""

    async def answer(http: web.Request) -> web.StreamResponse:
        stream = EventStream(http, Outbox())
        await handler(stream)
        return await stream.end()

    async with served(answer) as address:
        reader, writer = await ask(address, version)
        yield reader
        writer.close()


@asynccontextmanager
async def served(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> AsyncIterator[tuple[str, int]]:
    """Where a server listens that gives `answer`."""
    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][:2]
    finally:
        await runner.cleanup()


async def ask(
    address: tuple[str, int], version: str = "1.1"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address, limit=1 << 12)
    connection = "close" if version == "1.0" else "keep-alive"
    head = f"GET / HTTP/{version}\r\nHost: here\r\nConnection: {connection}\r\n\r\n"
    writer.write(head.encode())
    return reader, writer


async def body(reader: asyncio.StreamReader) -> bytes:
    """A chunked body, less the chunks."""
    await reader.readuntil(b"\r\n\r\n")
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        assert await reader.readexactly(2) == b"\r\n"
    return b"".join(parts)


@on_loop
async def test_both_ways_keep_their_order() -> None:
    async def handler(stream: EventStream) -> None:
        assert not stream.has_room, "headers first"
        await stream.write(b"a")
        for part in (b"b", b"c" * 300):
            assert stream.has_room
            stream.write_soon(part)
        await stream.write(b"d")
        stream.write_soon(b"e")

    async with connection(handler) as reader:
        assert await body(reader) == b"ab" + b"c" * 300 + b"de"


@on_loop
async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    async def handler(stream: EventStream) -> None:
        await stream.write(b"a")
        assert not stream.has_room
        await stream.write(b"b")

    async with connection(handler, "1.0") as reader:
        assert (await reader.read()).endswith(b"\r\n\r\nab")


@on_loop
async def test_a_slow_client_runs_out_of_room_and_misses_nothing() -> None:
    part, sent = b"x" * 1000, 0
    full = asyncio.Event()

    async def handler(stream: EventStream) -> None:
        nonlocal sent
        await stream.write(b"a")
        while stream.has_room:
            stream.write_soon(part)
            sent += 1
            await asyncio.sleep(0)  # the loop hands it to the kernel, while that takes it
        assert stream.has_begun
        full.set()
        await stream.write(b"z")

    async with connection(handler) as reader:
        async with asyncio.timeout(WAIT_S):
            await full.wait()
            assert sent > MAX_UNSENT_BYTES / len(part)
            assert await body(reader) == b"a" + part * sent + b"z"


@on_loop
async def test_one_turn_of_the_loop_holds_a_bounded_number_of_events() -> None:
    async def handler(stream: EventStream) -> None:
        await stream.write(b"a")
        for _ in range(MAX_UNSENT_EVENTS + 1):
            if stream.has_room:
                stream.write_soon(b"b")
        assert not stream.has_room
        await stream.write(b"c")
        assert stream.has_room

    async with connection(handler) as reader:
        assert await body(reader) == b"a" + b"b" * MAX_UNSENT_EVENTS + b"c"


@on_loop
async def test_there_is_no_room_once_the_client_left() -> None:
    left, over = asyncio.Event(), asyncio.Event()

    async def handler(stream: EventStream) -> None:
        await stream.write(b"a")
        await left.wait()
        async with asyncio.timeout(WAIT_S):
            while stream.has_room:
                await asyncio.sleep(0)
        over.set()

    async with connection(handler) as reader:
        await reader.readuntil(b"a\r\n")
        reader._transport.close()  # type: ignore[attr-defined]
        left.set()
        await asyncio.wait_for(over.wait(), WAIT_S)


@on_loop
async def test_what_comes_in_one_go_leaves_in_one_chunk() -> None:
    async def handler(stream: EventStream) -> None:
        await stream.write(b"a")
        for part in (b"b", b"c", b"d"):
            stream.write_soon(part)
        await asyncio.sleep(0.01)
        stream.write_soon(b"e")

    async with connection(handler) as reader:
        answer = await reader.readuntil(b"\r\n0\r\n\r\n")
    assert answer.endswith(b"\r\n\r\n1\r\na\r\n3\r\nbcd\r\n1\r\ne\r\n0\r\n\r\n")


def test_a_client_that_leaves_takes_nobody_else_along() -> None:
    """uvloop raises where a closed transport is written to."""
    outbox, streams, gone = Outbox(), [], asyncio.Event()

    async def answer(http: web.Request) -> web.StreamResponse:
        stream = EventStream(http, outbox)
        streams.append((stream, http.transport))
        await stream.write(b"a")
        await gone.wait()
        return await stream.end()

    async def scenario() -> None:
        async with served(answer) as address:
            _, (other, writer) = [await ask(address), await ask(address)]
            async with asyncio.timeout(WAIT_S):
                while len(streams) < 2 or not all(stream.has_room for stream, _ in streams):
                    await asyncio.sleep(0)
            streams[0][1].abort()
            await asyncio.sleep(0.01)
            for stream, _ in streams:
                stream.write_soon(b"b")
            await asyncio.wait_for(other.readuntil(b"1\r\nb\r\n"), WAIT_S)
            gone.set()
            writer.close()

    uvloop.run(scenario())
