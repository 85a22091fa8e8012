"""Reads server-sent events as a browser does, by the letter of the WHATWG HTML standard; shares no line with Parley."""

import re
from typing import NamedTuple


class Told(NamedTuple):
    """One event as a client gets it."""

    name: str
    id: str
    data: str


def read(stream: bytes, *, to_its_end: bool = False) -> list[Told]:
    """The events of a whole stream, as the WHATWG HTML standard has them (9.2.6, interpreting an event stream).

    to_its_end: with the last event even if no blank line ends it.
    """
    lines = re.split("\r\n|\n|\r", stream.decode().removeprefix("\ufeff"))
    # What follows the last line end is no line.
    lines = [*lines, ""] if to_its_end else lines[:-1]
    events: list[Told] = []
    name, last_id = "message", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                events.append(Told(name, last_id, "\n".join(data)))
            name, data = "message", []
            continue
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match key:
            case "event":
                name = value
            case "data":
                data.append(value)
            case "id" if "\x00" not in value:
                last_id = value
    return events
