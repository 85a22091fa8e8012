"""A file is what its name or media type says, if its bytes agree; else it is refused."""

import pytest

from shared.file_types import UnknownFileType, checked_type, type_by_media_type, type_by_name

DOCX = b"PK\x03\x04" + b"\0" * 20 + b"word/document.xml"
PDF = b"%PDF-1.7\n\0"


@pytest.mark.parametrize(
    ("name", "file_type"),
    [
        ("a.txt", "txt"),
        ("A.MD", "md"),
        ("notes.markdown", "md"),
        ("x.y.htm", "html"),
        ("paper.pdf", "pdf"),
        ("letter.DOCX", "docx"),
        ("letter.doc", None),
        ("README", None),
        ("", None),
    ],
)
def test_a_name_says_the_type_by_its_suffix(name: str, file_type: str | None) -> None:
    assert type_by_name(name) == file_type


def test_a_media_type_says_it_whatever_its_parameters() -> None:
    assert type_by_media_type("Text/HTML; charset=utf-8") == "html"
    assert type_by_media_type("image/png") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"plain"),
        ("a.txt", b""),
        ("a.txt", "\ufefftext".encode("utf-16")),
        ("a.txt", b"<p>a text about HTML"),
        ("a.md", b"# Title"),
        ("a.html", b"  <!DOCTYPE html><title>x"),
        ("a.html", b"<p>fragment"),
        ("a.pdf", b"junk\n" + PDF),
        ("a.docx", DOCX),
    ],
)
def test_bytes_that_agree_are_believed(name: str, content: bytes) -> None:
    assert checked_type(type_by_name(name), content) == type_by_name(name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", PDF),
        ("a.txt", DOCX),
        ("a.md", b"\x89PNG\r\n\x1a\n\0\0"),
        ("a.html", b"no markup at all"),
        ("a.html", PDF),
        ("a.pdf", b"plain"),
        ("a.pdf", DOCX),
        ("a.docx", PDF),
        ("a.docx", b"PK\x03\x04 some other archive"),
        ("a.docx", b"\xd0\xcf\x11\xe0 an old .doc, or one with a password"),
    ],
)
def test_mislabelled_bytes_are_refused(name: str, content: bytes) -> None:
    with pytest.raises(UnknownFileType, match="said to be"):
        checked_type(type_by_name(name), content)


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownFileType, match="txt, md, html, pdf, docx"):
        checked_type(type_by_name("a.exe"), b"MZ")
