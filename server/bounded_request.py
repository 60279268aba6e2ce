"""How much the SuperLink reads of what somebody sends: a limit that holds before a byte of it is in memory.

=================  ==========================================================================
request            limit of its body
=================  ==========================================================================
part of a message  :data:`medfed.messages.MAX_MESSAGE_BYTES`, and room for the frame around it
anything else      :data:`medfed.messages.MAX_ENVELOPE_BYTES`
=================  ==========================================================================

Whoever knows the address can send, before Flower looks at the signature. A body must say how long it is: HTTP servers
hold it to that, and one that does not say could have no end. The limit is of each body alone: many at once still fill
the memory, which is for a firewall to prevent. ``client/bounded_answer.py`` is the other direction.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from medfed.messages import MAX_ENVELOPE_BYTES, MAX_MESSAGE_BYTES, MESSAGE_FRAME_BYTES

_PART_PATH = "/push-object"


def refusal_of_body(path: str, headers: Iterable[tuple[bytes, bytes]]) -> HTTPStatus | None:
    """How a request is refused for the length of its body; None if it may be read.

    Args:
        path: of the request.
        headers: with names in lower case, as ASGI has them.
    """
    given = list(headers)
    if any(name == b"transfer-encoding" for name, _ in given):
        return HTTPStatus.LENGTH_REQUIRED
    lengths = [value for name, value in given if name == b"content-length"]
    if len(lengths) > 1 or any(not value.isdigit() for value in lengths):
        return HTTPStatus.BAD_REQUEST
    limit = MAX_MESSAGE_BYTES + MESSAGE_FRAME_BYTES if path.endswith(_PART_PATH) else MAX_ENVELOPE_BYTES
    if any(len(value) > len(str(limit)) or int(value) > limit for value in lengths):
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return None
