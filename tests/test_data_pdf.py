"""PDF pages: text, boxes against the drawn ink, the paper's filters, files that cannot be read."""

import io

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record, check_record
from qwenvl_jax.data.sources.open_stream import open_stream
from qwenvl_jax.data.sources.pdf import PageLimits, PdfPages
from qwenvl_jax.data.sources.pdf_page import open_pdf, read_page
from qwenvl_jax.data.sources.stream import Refusal

HELLO = (
    (72, 700, "Hello world, this is a line"),
    (72, 660, "A second line"),
    (400, 660, "far off"),
)


def pdf(pages=(HELLO,), rotate=0, turn="1 0 0 1", extra=b"", capital_a="0041"):
    """A small PDF of lines (x, y, text) in Helvetica, written by hand; `turn` is of each line.

    `capital_a` is the character that the font says an A means, in hexadecimal.
    """
    meaning = f"1 beginbfchar <41> <{capital_a}> endbfchar".encode()
    rest = b"2 beginbfrange <20> <40> <0020> <42> <7e> <0042> endbfrange"
    space = b"1 begincodespacerange <00> <ff> endcodespacerange"
    cmap = b"begincmap\n" + space + b"\n" + meaning + b"\n" + rest + b"\nendcmap\n"
    encoding = f"/ToUnicode {4 + 2 * len(pages)} 0 R"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids [".encode()
        + b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(pages)))
        + b"] >>",
        f"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica {encoding} >>".encode(),
    ]
    for i, lines in enumerate(pages):
        drawn = b"".join(
            f"BT /F1 20 Tf {turn} {x} {y} Tm ({text}) Tj ET\n".encode("latin-1")
            for x, y, text in lines
        )
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Rotate {rotate} /Contents "
            f"{5 + 2 * i} 0 R /Resources << /Font << /F1 3 0 R >> >> >>".encode()
        )
        objects.append(b"<< /Length %d >>\nstream\n" % len(drawn) + drawn + b"endstream")
    objects.append(b"<< /Length %d >>\nstream\n" % len(cmap) + cmap + b"endstream")
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n" % number + body + b"\nendobj\n"
    start, count = len(data), len(objects) + 1
    data += b"xref\n0 %d\n0000000000 65535 f \n" % count
    data += b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer << /Size %d /Root 1 0 R %s >>\n" % (count, extra)
    return data + trailer + b"startxref\n%d\n%%%%EOF\n" % start


ENCRYPTED = (
    b"/ID [<00> <00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <"
    + b"ab" * 32
    + b"> /U <"
    + b"cd" * 32
    + b"> >>"
)


def page_of(data, side=800):
    return read_page(open_pdf(data, "it"), 0, side)


TURNED = ((500, 72, "Read from the side"), (460, 72, "A second line"))


@pytest.mark.parametrize(
    ("data", "lines", "size"),
    [
        (pdf(), HELLO, (600, 800)),
        (pdf((TURNED,), rotate=90, turn="0 1 -1 0"), TURNED, (800, 600)),
    ],
    ids=["upright", "turned"],
)
def test_boxes_hold_the_ink_of_their_text(data, lines, size):
    page = page_of(data)
    assert {line.text for line in page.lines} == {text for *_, text in lines}
    assert page.image.size == size
    ink_YX = np.asarray(page.image.convert("L")) < 128
    free_YX = ink_YX.copy()
    for line in page.lines:
        x1, y1, x2, y2 = (round(edge) for edge in line.box)
        inside = ink_YX[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1]
        ys, xs = np.nonzero(inside)
        slack = (ys.min(), xs.min(), inside.shape[0] - ys.max(), inside.shape[1] - xs.max())
        assert max(slack) <= 4, "the box is tight"
        free_YX[y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = False
    assert not free_YX.any(), "no ink outside of the boxes"


def test_text_that_lies_on_its_side_is_left_out():
    assert page_of(pdf(rotate=90)).lines == []
    assert page_of(pdf(rotate=180)).lines == []
    assert page_of(pdf((TURNED,), turn="0 1 -1 0")).lines == []


def test_words_are_the_words_of_the_lines():
    page = page_of(pdf())
    assert [word.text for word in page.words] == page.text.split()
    first, second = page.words[:2]
    assert first.box[2] < second.box[0]
    assert page.lines[0].box[0] == first.box[0]


def test_pages_become_rows_and_the_filters_say_why_not(tmp_path):
    many = tuple((40, 780 - 12 * i, "x" * 40) for i in range(60))
    (tmp_path / "a.pdf").write_bytes(pdf((HELLO, ((72, 700, "few"),), many)))
    (tmp_path / "b.pdf").write_bytes(pdf(capital_a="0141"))
    (tmp_path / "c.pdf").write_bytes(pdf(capital_a="E012"))
    (tmp_path / "locked.pdf").write_bytes(pdf(extra=ENCRYPTED))
    (tmp_path / "torn.pdf").write_bytes(b"%PDF-1.4 nothing more")
    stream = open_stream(tmp_path)
    assert isinstance(stream, PdfPages)
    assert stream.shards() == ["a.pdf", "b.pdf", "c.pdf", "locked.pdf", "torn.pdf"]
    rows = [row for shard in stream.shards() for row in stream.read(shard)]
    good, *refused = rows
    assert isinstance(good, Record)
    check_record(good)
    assert good.key == "a.pdf#1"
    text, quad = good.fields["lines"][1]
    assert text == "A second line"
    assert abs(quad[0][0] - 72 / 600 * 1000) < 4
    assert abs(quad[2][1] - 140 / 800 * 1000) < 8
    with Image.open(io.BytesIO(good.images[0])) as image:
        assert image.size == (768, 1024)
    assert [(row.key, row.reason) for row in refused] == [
        ("a.pdf#2", "few characters"),
        ("a.pdf#3", "many characters"),
        ("b.pdf#1", "Latin Extended characters"),
        ("c.pdf#1", "Private Use characters"),
        ("locked.pdf", "encrypted PDF"),
        ("torn.pdf", "damaged PDF"),
    ]


def test_settings_change_rows_and_fingerprint(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf())
    lines, words = PdfPages(path), PdfPages(path, unit="word")
    (row,) = words.read("a.pdf")
    assert [text for text, _ in row.fields["lines"]][:2] == ["Hello", "world,"]
    assert lines.fingerprint != words.fingerprint == PdfPages(path, unit="word").fingerprint
    (small,) = PdfPages(path, side=200).read("a.pdf")
    assert small.reason == "small picture"
    (kept,) = PdfPages(path, side=200, limits=PageLimits(min_side=100)).read("a.pdf")
    assert isinstance(kept, Record)


def test_what_is_no_pdf_raises(tmp_path):
    with pytest.raises(DataError, match=r"no such file"):
        PdfPages(tmp_path / "none")
    with pytest.raises(Refusal, match="cannot be opened"):
        open_pdf(b"", "empty")
    with pytest.raises(DataError, match=r"side must be 1\.\.4096"):
        read_page(open_pdf(pdf(), "it"), 0, 10**6)
