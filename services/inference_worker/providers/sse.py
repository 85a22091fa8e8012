"""Server-sent events out of bytes, however the network has cut them. Pure."""

EVENT_MAX_BYTES = 8 * 1024 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventParser:
    """Turns a stream of bytes into the data of its events; names, ids and comments are passed over."""

    def __init__(self) -> None:
        self._rest = b""
        self._held = b""

    def feed(self, read: bytes) -> list[bytes]:
        """The data of every event that these bytes complete. Raises ValueError for an event that never ends."""
        if self._held:
            read, self._held = self._held + read, b""
        if b"\r" in read:
            if read.endswith(b"\r"):
                # Half of a CR LF, perhaps.
                read, self._held = read[:-1], b"\r"
            read = read.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        blocks = (self._rest + read).split(b"\n\n")
        self._rest = blocks.pop()
        if len(self._rest) > EVENT_MAX_BYTES:
            raise ValueError("an event without end")
        return [data for block in blocks if (data := _data(block))]

    def end(self) -> list[bytes]:
        """The data of a last event whose blank line never came."""
        data, self._rest = _data(self._rest), b""
        return [data] if data else []


def _data(block: bytes) -> bytes:
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    lines = block.removeprefix(_BYTE_ORDER_MARK).split(b"\n")
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")).strip()
