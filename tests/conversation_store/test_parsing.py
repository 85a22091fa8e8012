"""Files are read by a process of their own, within limits; what cannot be read is refused with a reason."""

import asyncio
import time

import psutil
import pytest

from services.conversation_store.knowledge.parsing import Unreadable
from services.conversation_store.knowledge.parsing.parser import PROGRAM, Limits, Parser
from shared.contracts.sources import FileType
from tests.conversation_store import files

BOMB = files.docx(["text"], padding=400 * 1024 * 1024)


@pytest.fixture
def parser() -> Parser:
    return Parser()


async def test_text_is_read_in_the_encodings_that_people_use(parser: Parser) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        parsed = await parser.text("txt", "Caf\u00e9\r\n\r\n\r\n\r\nau lait".encode(encoding))
        assert (parsed.title, parsed.text) == (None, "Café\n\nau lait"), encoding


async def test_markdown_stays_as_it_is_and_gives_its_first_heading(parser: Parser) -> None:
    parsed = await parser.text("md", b"intro\n\n## *Second* level ##\n\n- item_one")
    assert (parsed.title, parsed.text) == ("*Second* level", "intro\n\n## *Second* level ##\n\n- item_one")


async def test_a_page_is_read_without_what_is_not_its_text(parser: Parser) -> None:
    page = b"""<html><head><title> A  page </title><style>p {}</style></head><body><nav>Home</nav><script>x()</script>
    <h2>Prices</h2><p>It costs <a href="/x">5 &euro;</a>_a_month.</p><table><tr><th>a<th>b<tr><td>1<td>2</table>"""
    parsed = await parser.text("html", page)
    assert parsed.title == "A page"
    assert parsed.text.startswith("## Prices\n\nIt costs 5 €_a_month.\n\n| a | b |")
    assert not {"Home", "x()", "p {}"} & set(parsed.text.split("\n"))


async def test_of_a_page_with_a_main_part_only_that_is_read(parser: Parser) -> None:
    parsed = await parser.text("html", b"<header>Menu</header><main><h1>Truth</h1>Here.</main><footer>Cookies</footer>")
    assert (parsed.title, parsed.text) == ("Truth", "# Truth\n\nHere.")


async def test_a_word_document_is_read_with_its_headings(parser: Parser) -> None:
    parsed = await parser.text("docx", files.docx(["One &amp; two.", "Three."], "The Heading"))
    assert (parsed.title, parsed.text) == ("The Heading", "# The Heading\n\nOne & two.\n\nThree.")


async def test_a_pdf_is_read_also_if_it_may_only_not_be_changed(parser: Parser) -> None:
    for content in (
        files.pdf(["First line", "second line"], title="Paper"),
        files.pdf(["First line", "second line"], title="Paper", owner_password="mine"),
    ):
        parsed = await parser.text("pdf", content)
        assert parsed.title == "Paper"
        assert parsed.text.split() == ["First", "line", "second", "line"]


@pytest.mark.parametrize(
    ("file_type", "content", "reason"),
    [
        ("pdf", files.pdf(["secret"], password="yes"), "The PDF is protected by a password"),
        ("pdf", files.pdf(["text"])[:300], "The PDF is broken"),
        ("pdf", b"%PDF-1.7 and nothing else", "The PDF is broken"),
        ("pdf", files.pdf([]), "The PDF holds no text"),
        ("docx", files.docx(["text"])[:-40], "The docx is broken"),
        ("docx", BOMB, "unpacks to more than 64 MiB"),
        ("txt", b" \n ", "The file holds no text"),
        ("txt", b"many words " * 200_000, "more than 2,000,000 characters"),
        ("html", b"<div>" * 20_000 + b"deep", "nested too deeply"),
    ],
    ids=[
        "a locked pdf",
        "a cut pdf",
        "no pdf at all",
        "an empty pdf",
        "a cut docx",
        "an archive bomb",
        "an empty text",
        "a long text",
        "a deep page",
    ],
)
async def test_what_cannot_be_read_says_why(parser: Parser, file_type: FileType, content: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        await parser.text(file_type, content)


async def test_an_archive_bomb_costs_no_memory_here_or_there() -> None:
    assert len(BOMB) < 1024 * 1024
    before = psutil.Process().memory_info().rss
    # Not refused for its memory: though it unpacks to twice as much, it never took that.
    with pytest.raises(Unreadable, match="unpacks to"):
        await Parser(Limits(memory_bytes=200 * 1024 * 1024)).text("docx", BOMB)
    assert psutil.Process().memory_info().rss - before < 20 * 1024 * 1024


async def test_a_file_that_takes_too_long_is_given_up_and_its_process_ended() -> None:
    begun = time.monotonic()
    with pytest.raises(Unreadable, match=r"longer than 0\.5 seconds"):
        await Parser(Limits(seconds=0.5)).text("html", b"<p><b>" * 700_000)
    assert time.monotonic() - begun < 20
    assert not any(PROGRAM in child.cmdline() for child in psutil.Process().children())


async def test_a_file_that_computes_too_long_or_takes_too_much_memory_is_given_up() -> None:
    hostile = b"<p><b>" * 700_000
    with pytest.raises(Unreadable, match="1 seconds of computing"):
        await Parser(Limits(cpu_seconds=1)).text("html", hostile)
    with pytest.raises(Unreadable, match="more than 150 MiB of memory"):
        await Parser(Limits(memory_bytes=150 * 1024 * 1024)).text("html", hostile)


async def test_the_loop_goes_on_while_a_file_is_read(parser: Parser) -> None:
    reading = asyncio.ensure_future(parser.text("html", b"<p>word " * 10_000))
    ticks = 0
    while not reading.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 10
    assert "word word" in (await reading).text.replace("\n\n", " ")


async def test_a_sitemap_gives_its_pages_and_a_broken_one_a_reason(parser: Parser) -> None:
    space = b'xmlns="http://www.sitemaps.org/schemas/sitemap/0.9"'
    pages = b"<urlset %b><url><loc> https://a.example/1 </loc></url><url><loc>https://a.example/2</loc></url></urlset>"
    assert await parser.sitemap(pages % space) == (["https://a.example/1", "https://a.example/2"], [])
    index = b"<sitemapindex %b><sitemap><loc>https://a.example/map.xml</loc></sitemap></sitemapindex>"
    assert await parser.sitemap(index % space) == ([], ["https://a.example/map.xml"])
    entities = b'<!DOCTYPE x [<!ENTITY a "%b">]>' % (b"a" * 1000)
    with pytest.raises(Unreadable, match="names no pages"):
        await parser.sitemap(entities + b"<urlset><url><loc>&a;</loc></url></urlset>")
    with pytest.raises(Unreadable, match="no valid XML"):
        await parser.sitemap(b"<html><p>not found")
