"""Makes files as people upload them, and as nobody should."""

import io
import zipfile

import pypdf
from pypdf.generic import DictionaryObject, NameObject, StreamObject

_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_RELATIONSHIPS = "http://schemas.openxmlformats.org/package/2006/relationships"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"


def docx(paragraphs: list[str], heading: str = "", *, padding: int = 0) -> bytes:
    """A Word document with one heading and these paragraphs; and so many bytes that are packed to next to nothing."""
    styled = f'<w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>{heading}</w:t></w:r>'
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "[Content_Types].xml",
            '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            '<Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.'
            'wordprocessingml.document.main+xml"/></Types>',
        )
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{_RELATIONSHIPS}">'
            f'<Relationship Id="r1" Type="{_OFFICE}" Target="word/document.xml"/></Relationships>',
        )
        archive.writestr(
            "word/styles.xml",
            f'<w:styles xmlns:w="{_WORD}"><w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/>'
            "</w:style></w:styles>",
        )
        archive.writestr(
            "word/_rels/document.xml.rels",
            f'<Relationships xmlns="{_RELATIONSHIPS}"><Relationship Id="s1" Target="styles.xml" '
            'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/styles"/></Relationships>',
        )
        document = f'<w:document xmlns:w="{_WORD}"><w:body><w:p>{styled}</w:p>{body}</w:body></w:document>'
        archive.writestr("word/document.xml", document + " " * padding)
    return packed.getvalue()


def pdf(lines: list[str], *, title: str = "", password: str | None = None, owner_password: str | None = None) -> bytes:
    """A PDF of one page; with a password that it wants for reading, or one that it wants for being changed only."""
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(width=612, height=792)
    font = DictionaryObject(
        {
            NameObject("/Type"): NameObject("/Font"),
            NameObject("/Subtype"): NameObject("/Type1"),
            NameObject("/BaseFont"): NameObject("/Helvetica"),
        }
    )
    page[NameObject("/Resources")] = DictionaryObject(
        {NameObject("/Font"): DictionaryObject({NameObject("/F1"): writer._add_object(font)})}
    )
    drawn = StreamObject()
    shown = "".join(f"({line}) Tj 0 -14 Td " for line in lines)
    drawn.set_data(f"BT /F1 12 Tf 72 720 Td {shown} ET".encode())
    page[NameObject("/Contents")] = writer._add_object(drawn)
    if title:
        writer.add_metadata({"/Title": title})
    if password is not None or owner_password is not None:
        writer.encrypt(password or "", owner_password, algorithm="AES-256")
    written = io.BytesIO()
    writer.write(written)
    return written.getvalue()
