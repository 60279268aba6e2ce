"""How much a site reads of what a server answers: a limit that holds while bytes arrive, before they are in memory.

=================  ==========================================================================
request            limit of its answer
=================  ==========================================================================
part of a message  :data:`medfed.messages.MAX_MESSAGE_BYTES`, and room for the frame around it
anything else      :data:`medfed.messages.MAX_ENVELOPE_BYTES`
=================  ==========================================================================

An answer that is compressed is refused: what it would grow to cannot be told from its length.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx

from medfed.errors import LinkDownError
from medfed.messages import MAX_ENVELOPE_BYTES, MAX_MESSAGE_BYTES, MESSAGE_FRAME_BYTES, told

_PART_PATH = "/pull-object"


class _Bounded(httpx.SyncByteStream):
    """The bytes of an answer, up to a limit."""

    def __init__(self, stream: httpx.SyncByteStream, limit: int, path: str) -> None:
        self._stream = stream
        self._limit = limit
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        num_bytes = 0
        for chunk in self._stream:
            num_bytes += len(chunk)
            if num_bytes > self._limit:
                raise _too_long(self._path, self._limit)
            yield chunk

    def close(self) -> None:
        self._stream.close()


def bound_answers(client: httpx.Client) -> None:
    """Have a client refuse every answer that is compressed or longer than the limit of its request.

    Its requests raise :class:`~medfed.errors.LinkDownError` then, and the connection is closed.
    """
    client.headers["accept-encoding"] = "identity"
    client.event_hooks = {"response": [_bound]}


def _bound(response: httpx.Response) -> None:
    path = response.request.url.path
    limit = MAX_MESSAGE_BYTES + MESSAGE_FRAME_BYTES if path.endswith(_PART_PATH) else MAX_ENVELOPE_BYTES
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        response.close()
        raise LinkDownError(
            f"Expected a plain answer to {path}, got one in {told(encoding)!r}; check who answers there with "
            "'medfed site preflight'."
        )
    announced = response.headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal() and len(announced) < 20 and int(announced) > limit:
        response.close()
        raise _too_long(path, limit)
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Bounded(response.stream, limit, path)


def _too_long(path: str, limit: int) -> LinkDownError:
    return LinkDownError(
        f"Expected an answer of at most {limit} bytes to {path}, got a longer one; nothing of it is kept: check who "
        "answers there with 'medfed site preflight'."
    )
