"""Readers of each kind of file: bytes to a title and text, headings as Markdown has them. Run under limits only.

Each imports its library itself: all of them together take longer to import than a file takes to be read.
"""

import io
import re
import zipfile
from collections.abc import Callable, Mapping

from services.conversation_store.knowledge.parsing import Parsed, Unreadable

UNPACKED_MAX_BYTES = 64 * 1024 * 1024
UNPACKED_MAX_FILES = 5_000

_UNSAID = ["script", "style", "noscript", "template", "svg", "iframe", "form", "nav", "head"]
_TITLE_MAX_CHARACTERS = 200
_HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*){2,}")
_ENCRYPTED = 0x1


def text(content: bytes) -> Parsed:
    """Plain text: UTF-8, UTF-16 with its mark, or else what Windows wrote in the West."""
    return Parsed(None, _tidy(_decoded(content)))


def markdown(content: bytes) -> Parsed:
    """Markdown stays as it is: a model reads it, and its headings show where passages may begin."""
    parsed = _tidy(_decoded(content))
    return Parsed(_first_heading(parsed), parsed)


def html(content: bytes) -> Parsed:
    """A page's main part, without what only a browser wants."""
    from bs4 import BeautifulSoup, Tag
    from markdownify import ATX, MarkdownConverter

    soup = BeautifulSoup(content, "lxml")
    title = _short(soup.title.get_text()) if soup.title else None
    for tag in soup.find_all(_UNSAID):
        tag.decompose()
    mains = soup.find_all("main") or soup.find_all("article")
    root: Tag = mains[0] if len(mains) == 1 else soup
    converter = MarkdownConverter(
        heading_style=ATX,
        bullets="-",
        strip=["a", "img"],
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )
    parsed = _tidy(converter.convert_soup(root))
    return Parsed(title or _first_heading(parsed), parsed)


def docx(content: bytes) -> Parsed:
    """A Word document, by way of HTML; its pictures are left out."""
    import mammoth

    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        raise Unreadable("The docx is broken: it cannot be unpacked.") from None
    if any(member.flag_bits & _ENCRYPTED for member in members):
        raise Unreadable("The docx is protected by a password: upload it without one.")
    # No member unpacks to more than it says here: the reader stops there.
    if len(members) > UNPACKED_MAX_FILES or sum(member.file_size for member in members) > UNPACKED_MAX_BYTES:
        raise Unreadable(f"The docx unpacks to more than {UNPACKED_MAX_BYTES // 2**20} MiB.")
    converted = mammoth.convert_to_html(
        io.BytesIO(content),
        include_embedded_style_map=False,
        convert_image=mammoth.images.img_element(lambda _: {}),
    )
    return html(converted.value.encode())


def pdf(content: bytes) -> Parsed:
    """The text of a PDF's pages."""
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        reader = pypdf.PdfReader(io.BytesIO(content))
        # Many are encrypted only against being changed, and open with no password at all.
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("The PDF is protected by a password: upload it without one.")
        pages = [page.extract_text() for page in reader.pages]
        title = reader.metadata.title if reader.metadata else None
    except PyPdfError:
        raise Unreadable("The PDF is broken: it cannot be read.") from None
    return Parsed(_short(title or ""), _tidy("\n\n".join(pages)))


READERS: Mapping[str, Callable[[bytes], Parsed]] = {
    "txt": text,
    "md": markdown,
    "html": html,
    "pdf": pdf,
    "docx": docx,
}


def sitemap(content: bytes) -> tuple[list[str], list[str]]:
    """The addresses in a sitemap: those of pages, and those of further sitemaps."""
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(content, parser)
    except etree.XMLSyntaxError:
        raise Unreadable("The sitemap is no valid XML.") from None
    addresses: dict[str, list[str]] = {"url": [], "sitemap": []}
    for entry in root:
        name = etree.QName(entry).localname if isinstance(entry.tag, str) else ""
        if name in addresses and (address := entry.findtext("{*}loc")):
            addresses[name].append(address.strip())
    if not addresses["url"] and not addresses["sitemap"]:
        raise Unreadable("The sitemap names no pages.")
    return addresses["url"], addresses["sitemap"]


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _tidy(parsed: str) -> str:
    """Line ends alike, no characters that no database takes, at most one blank line."""
    parsed = parsed.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n").replace("\0", "")
    return _BLANK_LINES.sub("\n\n", parsed.encode(errors="replace").decode()).strip()


def _first_heading(parsed: str) -> str | None:
    heading = _HEADING.search(parsed)
    return _short(heading[1].strip(" #")) if heading else None


def _short(title: str) -> str | None:
    return " ".join(title.replace("\0", "").split())[:_TITLE_MAX_CHARACTERS] or None
