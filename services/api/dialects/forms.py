"""Reads forms as browsers and curl send them with files (multipart/form-data)."""

from dataclasses import dataclass, field

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from services.api.dialects.bodies import invalid
from shared.contracts.problems import FieldError, refused
from shared.contracts.sources import FILE_MAX_BYTES, NewFile
from shared.file_types import UnknownFileType, checked_type, type_by_media_type, type_by_name

PARTS_MAX = 100
HEADER_MAX_BYTES = 4096
FILE_BODY_MAX_BYTES = FILE_MAX_BYTES + 64 * 1024
"""A file and the form around it."""
FILE_NAME_MAX_CHARACTERS = 200


@dataclass(slots=True)
class Part:
    """One field of a form. With a `filename` it is a file; `media_type` is what the client took it for."""

    name: str = ""
    filename: str | None = None
    media_type: str = ""
    content: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str | None:
        """The field's value; None if it is no UTF-8 text, or holds what no database takes."""
        try:
            value = self.content.decode()
        except UnicodeDecodeError:
            return None
        return None if "\0" in value else value


def is_form(content_type: str) -> bool:
    """Whether a body of that Content-Type is such a form."""
    return content_type.partition(";")[0].strip().lower() == "multipart/form-data"


def read_form(content_type: str, body: bytes) -> list[Part]:
    """The fields of a form in their order. Raises ServiceError(invalid_request) for what is none."""
    reading = _Reading()
    try:
        _, options = parse_options_header(content_type)
        parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": reading.begin,
                "on_header_field": reading.header_name,
                "on_header_value": reading.header_value,
                "on_header_end": reading.header_end,
                "on_part_data": reading.data,
                "on_end": reading.end,
            },
            max_header_size=HEADER_MAX_BYTES,
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, KeyError, ValueError):
        raise refused("invalid_request", "The body is no multipart form.") from None
    if not reading.is_over:
        raise refused("invalid_request", "The multipart form is cut off.")
    return reading.parts


def sent_file(part: Part) -> NewFile:
    """The file in a field named `file`. Raises ServiceError: too_large, unsupported_type, invalid_request if empty."""
    content = bytes(part.content)
    if len(content) > FILE_MAX_BYTES:
        raise refused("too_large", f"A file may have {FILE_MAX_BYTES} bytes at most.")
    if not content:
        raise invalid(FieldError(path="/file", message="the file is empty"))
    # Some browsers send the path, too.
    name = (part.filename or "").replace("\\", "/").rpartition("/")[2].replace("\0", "")
    try:
        file_type = checked_type(type_by_name(name) or type_by_media_type(part.media_type), content)
    except UnknownFileType as error:
        raise refused("unsupported_type", str(error)) from None
    return NewFile(name=name[-FILE_NAME_MAX_CHARACTERS:] or f"file.{file_type}", file_type=file_type, content=content)


class _Reading:
    """Collects what the parser finds."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.is_over = False
        self._header = bytearray()
        self._value = bytearray()

    def begin(self) -> None:
        if len(self.parts) == PARTS_MAX:
            raise ValueError("too many parts")
        self.parts.append(Part())

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        part, header, value = self.parts[-1], self._header.lower(), bytes(self._value)
        self._header, self._value = bytearray(), bytearray()
        if header == b"content-type":
            part.media_type = value.decode("latin-1")
        elif header == b"content-disposition":
            _, options = parse_options_header(value)
            part.name = options.get(b"name", b"").decode(errors="replace")
            filename = options.get(b"filename")
            part.filename = None if filename is None else filename.decode(errors="replace")

    def data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].content += memoryview(data)[start:end]

    def end(self) -> None:
        self.is_over = True
