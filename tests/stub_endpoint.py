"""A tiny OpenAI-compatible server: what `muxrt bench` must get along with, and how it may break."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

CHARS_PER_TOKEN = 5


@dataclass
class Stub:
    """Answers as told; remembers what it was asked."""

    models: tuple[str, ...] = ("a", "b")
    token_s: float = 0.001
    first_s: float = 0.0
    breaks: Mapping[str, str] = field(default_factory=dict)  # model -> how it misbehaves
    metrics: list[str] = field(default_factory=list)  # one text per reading, the last one stays
    loading: int = 0  # how often /ready says no
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    async def list(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def read_metrics(self, _: web.Request) -> web.Response:
        if not self.metrics:
            raise web.HTTPNotFound()
        text = self.metrics.pop(0) if len(self.metrics) > 1 else self.metrics[0]
        return web.Response(text=text)

    async def ready(self, _: web.Request) -> web.Response:
        self.loading -= 1
        if self.loading >= 0:
            return web.json_response({"message": f"{self.loading} to go"}, status=503)
        return web.json_response({"status": "ready"})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append({**body, "key": request.headers.get("Authorization")})
        probe = body["max_tokens"] == 1
        how = "" if probe else self.breaks.get(body["model"], "")
        if how in ("429", "500"):
            error = {"error": {"message": f"told to answer {how}", "type": "x", "code": None}}
            return web.json_response(error, status=int(how))
        if not body.get("stream"):
            said = {"role": "assistant", "content": f"{body['model']} says [x]"}
            return web.json_response({"choices": [{"message": said}]})
        return await self._stream(request, body, how)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], how: str
    ) -> web.StreamResponse:
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.first_s)
        if chat:
            await _event(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for index in range(body["max_tokens"]):
            if how == "cut" and index == 2:
                request.transport and request.transport.abort()
                return response
            if how == "error" and index == 2:
                await _event(response, {"error": {"message": "out of luck"}})
                return response
            await asyncio.sleep(self.token_s)
            said = {"delta": {"content": "x"}} if chat else {"text": "x"}
            await _event(response, {"choices": [said], "usage": None})
        if how == "silent end":
            return response
        usage = {
            "prompt_tokens": len(prompt) // CHARS_PER_TOKEN,
            "completion_tokens": body["max_tokens"],
        }
        await _event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _event(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(data).encode() + b"\n\n")


@asynccontextmanager
async def running(stub: Stub, port: int = 0) -> AsyncIterator[Stub]:
    """`stub` on `port` (0 = any free one); its `url` is set inside the block."""
    app = web.Application()
    app.router.add_get("/v1/models", stub.list)
    app.router.add_get("/ready", stub.ready)
    app.router.add_get("/metrics", stub.read_metrics)
    app.router.add_post("/v1/completions", stub.generate)
    app.router.add_post("/v1/chat/completions", stub.generate)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    stub.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield stub
    finally:
        await runner.cleanup()


async def _serve(port: int, stub: Stub) -> None:
    leave = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leave.set)
    async with running(stub, port):
        await leave.wait()


if __name__ == "__main__":  # stands for `muxrt serve FILE --port PORT`
    breaks = {"small": "429"} if "refuses" in sys.argv[1] else {}
    if "broken" in sys.argv[1]:
        sys.exit("told to give up")
    asyncio.run(_serve(int(sys.argv[3]), Stub(models=("small", "large"), breaks=breaks, loading=2)))
