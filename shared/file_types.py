"""Which kind of file is it? Told by its name or media type, and believed only if its bytes agree; pure."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import get_args

from shared.contracts.sources import FileType

FILE_TYPES: tuple[FileType, ...] = get_args(FileType)

_BY_SUFFIX: Mapping[str, FileType] = {
    **{f".{file_type}": file_type for file_type in FILE_TYPES},
    ".markdown": "md",
    ".text": "txt",
    ".htm": "html",
    ".xhtml": "html",
}
_BY_MEDIA_TYPE: Mapping[str, FileType] = {
    "text/plain": "txt",
    "text/markdown": "md",
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/pdf": "pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
}

_MARKUP = re.compile(rb"<(!doctype|!--|\?xml|[a-z][a-z0-9]*[\s>/])", re.IGNORECASE)
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# What begins like this is none of the texts, whatever its name says.
_BINARY = (b"%PDF-", b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"{\\rtf", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")
_PDF_HEADER_WITHIN = 1024


class UnknownFileType(Exception):
    """No file whose text can be read; the message says why, for whoever gave it."""


def type_by_name(name: str) -> FileType | None:
    """What a file's name says."""
    return _BY_SUFFIX.get(PurePosixPath(name.lower()).suffix)


def type_by_media_type(media_type: str) -> FileType | None:
    """What a Content-Type says, whatever its parameters."""
    return _BY_MEDIA_TYPE.get(media_type.partition(";")[0].strip().lower())


def checked_type(said: FileType | None, content: bytes) -> FileType:
    """The type that a name or a media type has said. Raises UnknownFileType if it said none, or the bytes disagree."""
    if said is None:
        raise UnknownFileType(f"Only these kinds of files can be read: {', '.join(FILE_TYPES)}.")
    if not _looks_like(said, content):
        hint = " One that is protected by a password, or an old .doc, cannot be read." if said == "docx" else ""
        raise UnknownFileType(f"The file is said to be {said}, but its content is something else.{hint}")
    return said


def _looks_like(said: FileType, content: bytes) -> bool:
    match said:
        case "pdf":
            return b"%PDF-" in content[:_PDF_HEADER_WITHIN]
        case "docx":
            return content.startswith(b"PK\x03\x04") and b"word/document" in content
        case "html":
            return _is_text(content) and _MARKUP.search(content) is not None
        case "txt" | "md":
            return _is_text(content)


def _is_text(content: bytes) -> bool:
    return content.startswith(_UTF_16) or not (content.startswith(_BINARY) or b"\0" in content)
