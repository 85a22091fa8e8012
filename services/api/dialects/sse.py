"""Writes server-sent events, by the rules of the WHATWG HTML standard."""

HEADERS = {
    "Content-Type": "text/event-stream",
    # Proxies must neither keep nor recompress what is meant to arrive now.
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}

PING = b": ping\n\n"


def event(name: bytes, data: bytes, id: bytes) -> bytes:
    """One event. None of the three may contain a line end; JSON never does."""
    return b"event: %b\nid: %b\ndata: %b\n\n" % (name, id, data)
