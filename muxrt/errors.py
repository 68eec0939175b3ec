"""One tree of errors; every error that can reach a client knows its HTTP status."""


class MuxrtError(Exception):
    """Root of everything muxrt raises on purpose."""

    status = 500
    kind = "server_error"  # `error.type` of the OpenAI error object
    code: str | None = None

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class ConfigError(MuxrtError):
    """A configuration, model folder or placement that cannot be served as written."""


class BadRequest(MuxrtError):
    """The client asked for something malformed or unsupported."""

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Unauthorized(MuxrtError):
    """No API key, or a wrong one."""

    status = 401
    kind = "invalid_request_error"
    code = "invalid_api_key"


class UnknownModel(MuxrtError):
    """No model of that name is served here."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"


class Conflict(MuxrtError):
    """What is asked for contradicts what is so, or what goes on: look, then ask again."""

    status = 409
    kind = "conflict"


class BodyTooLarge(MuxrtError):
    """The request body exceeds the endpoint's limit."""

    status = 413
    kind = "invalid_request_error"


class Overloaded(MuxrtError):
    """A bounded queue is full, or a deadline cannot be met: try again later."""

    status = 429
    kind = "rate_limit_error"
    code = "overloaded"


class TransferFailed(MuxrtError):
    """K and V did not come from another unit as they were there: they are computed again."""

    status = 503
    kind = "transfer_failed"


class Unavailable(MuxrtError):
    """The model's unit is starting, draining or being restarted."""

    status = 503
    kind = "service_unavailable"
    code = "unavailable"
