"""A request's body: JSON of a size that can be meant."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from moac_runtime.package.json_text import MOST_BYTES, parse_json
from moac_runtime.serve.errors import ApiError
from moac_runtime.serve.fields import BodyFields


async def read_body(request: Request) -> BodyFields:
    """The JSON object that a request brings. Raises ApiError."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise ApiError(415, f"the content type is {kind!r}; send application/json")
    data = await read_bytes(request)
    try:
        found = parse_json(data)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON ({error}); send a JSON object") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is a JSON {type(found).__name__}; send a JSON object")
    return BodyFields(found)


async def read_bytes(request: Request) -> bytes:
    """All of the body; one that is too long is not read to its end. Raises ApiError."""
    told = request.headers.get("content-length", "")
    if told.isdecimal() and (len(told) > 18 or int(told) > MOST_BYTES):
        raise _too_long()
    found = bytearray()
    try:
        async for part in request.stream():
            found += part
            if len(found) > MOST_BYTES:
                raise _too_long()
    except ClientDisconnect:
        raise ApiError(499, "the client left before its body was whole") from None
    return bytes(found)


def _too_long() -> ApiError:
    return ApiError(
        413, f"the body has more than {MOST_BYTES} bytes; send less", code="body_too_large"
    )
