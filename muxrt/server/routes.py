"""The HTTP routes: authentication, limits, answers, errors."""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic, time
from typing import Any
from uuid import uuid4

import msgspec
from aiohttp import web

from muxrt.errors import BadRequest, BodyTooLarge, MuxrtError, Unavailable, UnknownModel
from muxrt.server.answers import DONE, ChatDialect, CompletionDialect, Dialect, Writer
from muxrt.server.auth import KeyRing
from muxrt.server.call import Call
from muxrt.server.dispatch import Dispatcher
from muxrt.server.event_stream import EventStream, Outbox
from muxrt.server.openai import Ask, parse_chat, parse_completion
from muxrt.server.prometheus import CONTENT_TYPE, Metrics
from muxrt.server.readiness import readiness
from muxrt.server.reply import Reply
from muxrt.server.served_model import EncodedPrompt, ServedModel
from muxrt.server.traffic import TrafficLog
from muxrt.server.traffic_files import Entry
from muxrt.server.unit_process import UnitProcess

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Words = Callable[..., Dialect]

CLIENT_LEFT = 499  # as nginx counts them; nobody receives it
# Longer prompts are tokenised in a thread: below this, starting one takes longer than the work.
LONG_PROMPT = 2_000  # characters, or token ids
NAMES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


@dataclass(slots=True)
class Exchange:
    """A request to generate, and what is to be counted of it."""

    http: web.Request
    came_s: float  # wall clock
    model: str | None = None  # once it is known to be served here
    status: int | None = None  # of the outcome, where it is not that of the response
    key: int | None = None  # number of the client's API key
    call: Call | None = None  # once it was sent to a unit, and so is
    reply: Reply | None = None

    def entry(self, model: str, status: int) -> Entry:
        """What the traffic log keeps of it."""
        unit = None if self.call is None else self.call.unit
        if self.reply is None:
            return Entry(self.came_s, model, None, 0, None, None, status, unit, self.key, 1)
        seen = self.reply.outcome()
        return Entry(
            self.came_s,
            model,
            seen.prompt_tokens,
            seen.output_tokens,
            seen.timing.ttft_s,
            seen.timing.tpot_s,
            status,
            unit,
            self.key,
            seen.num_sequences,
        )


class Routes:
    """What the endpoint answers. `models` may still fill while they load."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        dispatcher: Dispatcher,
        units: Mapping[str, UnitProcess],
        metrics: Metrics,
        keys: KeyRing | None,
        salt_prefixes: bool,
        traffic: TrafficLog | None = None,
    ) -> None:
        self._models = models
        self._dispatcher = dispatcher
        self._units = units
        self._metrics = metrics
        self._keys = keys
        self._salt_prefixes = salt_prefixes
        self._traffic = traffic
        self._outbox = Outbox()
        self._created_s = int(time())

    def application(
        self, max_body_bytes: int, extend: Callable[[web.Application], None] = lambda app: None
    ) -> web.Application:
        """The aiohttp application; larger bodies get 413. `extend` adds routes of its own."""

        @web.middleware
        async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._errors(request, handler)

        app = web.Application(middlewares=[errors], client_max_size=max_body_bytes)
        app.router.add_post("/v1/completions", self._counted(self.completions))
        app.router.add_post("/v1/chat/completions", self._counted(self.chat))
        app.router.add_get("/v1/models", self.list_models)
        app.router.add_get("/v1/models/{name:.+}", self.show_model)
        app.router.add_get("/health", self.health)
        app.router.add_get("/ready", self.ready)
        app.router.add_get("/metrics", self.metrics)
        extend(app)
        return app

    # -- the outermost ring ------------------------------------------------------------------

    async def _errors(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error leaves as an OpenAI error object."""
        try:
            return await handler(http)
        except MuxrtError as error:
            return error_response(error)
        except web.HTTPException as error:
            return _http_error(http, error)
        except ConnectionResetError:
            return web.Response(status=CLIENT_LEFT)
        except Exception:
            log.exception("event=bug path=%s", http.path)
            return error_response(MuxrtError("internal error: the server's log has the details"))

    def _counted(self, answer: Callable[[Exchange], Awaitable[web.StreamResponse]]) -> Handler:
        """`answer` as a handler whose outcomes are counted by model and status."""

        async def handle(http: web.Request) -> web.StreamResponse:
            exchange = Exchange(http, time())
            try:
                response = await answer(exchange)
                exchange.status = exchange.status or response.status
                return response
            except (MuxrtError, web.HTTPException) as error:
                exchange.status = error.status
                raise
            except (asyncio.CancelledError, ConnectionResetError):
                exchange.status = CLIENT_LEFT
                raise
            finally:
                self._count(exchange, exchange.status or 500)

        return handle

    def _count(self, exchange: Exchange, status: int) -> None:
        """It has ended. A model's name that is not served here is the client's text: not logged."""
        self._metrics.on_response(exchange.model, status)
        if self._traffic is not None and exchange.model is not None:
            self._traffic.add(exchange.entry(exchange.model, status))

    def _authenticate(self, http: web.Request) -> bytes:
        """What the client's key is known by, nothing where anyone may ask. Raises Unauthorized."""
        if self._keys is None:
            return b""
        return self._keys.check(http.headers.get("Authorization"))

    # -- generation --------------------------------------------------------------------------

    async def completions(self, exchange: Exchange) -> web.StreamResponse:
        """POST /v1/completions."""
        return await self._generate(exchange, parse_completion, CompletionDialect)

    async def chat(self, exchange: Exchange) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        return await self._generate(exchange, parse_chat, ChatDialect)

    async def _generate(
        self, exchange: Exchange, parse: Callable[[bytes], Ask], words: Words
    ) -> web.StreamResponse:
        arrived_s = monotonic()
        known = self._authenticate(exchange.http)
        salt = known if self._salt_prefixes else b""
        if self._keys is not None:
            exchange.key = self._keys.number(known)
        ask = parse(await exchange.http.read())
        self._check_known(ask.model)
        exchange.model = ask.model
        model, prompts = await self._encoded(ask, salt)
        writer = Writer(words(model.tokenizer), uuid4().hex, int(time()), ask.model)
        with Call(self._dispatcher) as call:
            exchange.call = call
            self._start(call, model, ask, prompts, arrived_s)
            reply = Reply(ask, model, prompts, call, writer, arrived_s, self._metrics)
            exchange.reply = reply
            if ask.stream:
                return await _stream(exchange, reply, self._outbox)
            return _json(await reply.whole())

    async def _encoded(self, ask: Ask, salt: bytes) -> tuple[ServedModel, list[EncodedPrompt]]:
        """The model that is served by that name once its prompts are encoded, and those."""
        while True:
            model = self._model(ask.model)
            ready = self._dispatcher.admit(ask.model, ask.num_sequences)
            encode = partial(model.encode, ask, ready, salt)
            prompts = await _encode(model, ask, encode)
            if self._models.get(ask.model) is model:
                return model, prompts  # nobody has put another one in its place meanwhile

    def _start(
        self,
        call: Call,
        model: ServedModel,
        ask: Ask,
        prompts: Sequence[EncodedPrompt],
        arrived_s: float,
    ) -> None:
        """Send all or nothing: lengths are checked before the first is sent."""
        # While the prompts were encoded, others may have come, or the unit may have died.
        ready = self._dispatcher.admit(ask.model, ask.num_sequences)
        drafts = [model.drafts(ask, prompt, ready, arrived_s) for prompt in prompts]
        for index, choices in enumerate(drafts):
            call.start(index * ask.n, choices)

    def _check_known(self, name: str) -> None:
        if name not in self._dispatcher.models:
            served = ", ".join(self._dispatcher.models)
            raise UnknownModel(f"the model {name!r} does not exist here; served are: {served}")

    def _model(self, name: str) -> ServedModel:
        self._check_known(name)
        model = self._models.get(name)
        if model is None:
            raise Unavailable(f"{name} is loading; try again shortly", retry_after_s=1.0)
        return model

    # -- about the server --------------------------------------------------------------------

    async def list_models(self, http: web.Request) -> web.Response:
        """GET /v1/models."""
        self._authenticate(http)
        listed = [self._describe(name) for name in self._dispatcher.models]
        return _json(msgspec.json.encode({"object": "list", "data": listed}))

    async def show_model(self, http: web.Request) -> web.Response:
        """GET /v1/models/{name}."""
        self._authenticate(http)
        name = http.match_info["name"]
        self._check_known(name)
        return _json(msgspec.json.encode(self._describe(name)))

    def _describe(self, name: str) -> dict[str, Any]:
        served = [unit.models[name] for unit in self._units.values() if name in unit.models]
        lengths = [model.max_model_len for model in served]
        made_up = {"made_up": True} if any(model.is_made_up for model in served) else {}
        return {
            "id": name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "muxrt",
            "max_model_len": min(lengths, default=None),  # null while no unit serves it
            **made_up,
        }

    async def health(self, http: web.Request) -> web.Response:
        """GET /health: this process lives."""
        return _json(b'{"status":"ok"}')

    async def ready(self, http: web.Request) -> web.Response:
        """GET /ready: 200 if every model answers, else 503 with what is missing."""
        answer = readiness(self._dispatcher, self._units)
        headers = {} if answer.ready else {"Retry-After": "1"}
        return _json(msgspec.json.encode(answer), 200 if answer.ready else 503, headers)

    async def metrics(self, http: web.Request) -> web.Response:
        """GET /metrics."""
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def _encode(
    model: ServedModel, ask: Ask, encode: Callable[[], list[EncodedPrompt]]
) -> list[EncodedPrompt]:
    """Run `encode` here if it is quick, in a thread if it is not."""
    size = sum(len(prompt) for prompt in ask.prompts)
    size += sum(len(message["content"]) for message in ask.messages)
    if size <= LONG_PROMPT:
        return encode()
    return await asyncio.get_running_loop().run_in_executor(None, encode)


async def _stream(exchange: Exchange, reply: Reply, outbox: Outbox) -> web.StreamResponse:
    """Server-sent events, up to [DONE] or to what went wrong."""
    stream = EventStream(exchange.http, outbox)
    try:
        await reply.stream(stream)
        await stream.write(DONE)
    except MuxrtError as error:
        if not stream.has_begun:
            raise
        # The status is out; the stream says what happened and ends without [DONE].
        exchange.status = error.status
        await stream.write(b"data: " + error_body(error) + b"\n\n")
    return await stream.end()


# -- errors ----------------------------------------------------------------------------------


def error_body(error: MuxrtError) -> bytes:
    """The OpenAI error object."""
    param = error.param if isinstance(error, BadRequest) else None
    return msgspec.json.encode(
        {
            "error": {
                "message": error.message,
                "type": error.kind,
                "param": param,
                "code": error.code,
            }
        }
    )


def error_response(error: MuxrtError) -> web.Response:
    """An error as HTTP: status, Retry-After where there is one, and the object."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _json(error_body(error), error.status, headers)


def _http_error(http: web.Request, error: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own errors (no such route, wrong method, body too large), in the same form."""
    if error.status < 400:
        return error
    known: MuxrtError
    if error.status == 413:
        known = BodyTooLarge("the body is larger than endpoint.max_body_bytes")
    else:
        known = BadRequest(f"{http.method} {http.path}: {error.reason}")
        known.status = error.status
    known.code = NAMES.get(error.status)
    response = error_response(known)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _json(data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=data, status=status, headers=headers, content_type="application/json")
