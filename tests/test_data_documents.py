"""Documents: the ink of each line against its quad, the text drawn, and where it is from."""

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qwenvl_jax
from qwenvl_jax.data import tasks
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import decode_record, encode_record
from qwenvl_jax.data.sources import corpus, font_files, page_photo, page_rows, written_text
from qwenvl_jax.data.sources.documents import Documents
from qwenvl_jax.data.sources.page_layout import lay_out
from qwenvl_jax.data.sources.page_photo import OUTSIDE, PageSettings, photograph
from qwenvl_jax.data.sources.page_warp import BEND, Warp, random_warp
from qwenvl_jax.prompt.fonts import SHIPPED_FONT
from qwenvl_jax.prompt.tokenizer import load_tokenizer

NANO = Path(qwenvl_jax.__file__).parent / "assets" / "nano"
FONTS = (Path(SHIPPED_FONT),)
SMALL = PageSettings(short_side=(160, 300), max_lines=12)


def document(key, settings=SMALL):
    rng = random.Random(key)
    text = corpus.open_corpus(None).text(("en", "zh")[key % 2], "train", rng)
    return photograph(settings, text, FONTS, (), rng)


def lines_with_ink(made):
    """Pairs each labelled line with the ink of that line alone, taken the same way as the page."""
    labelled = list(made.lines)
    for line in made.page.lines:
        if labelled and (labelled[0].text, labelled[0].column) == (line.text, line.column):
            layer = Image.new("L", made.page.size)
            layer.paste(line.ink, line.box[:2])
            yield labelled.pop(0), np.asarray(made.warp.apply(layer))
    assert labelled == [], "every label belongs to a drawn line"


def outward(quad, points):
    """How far outside of each of the quad's edges the points lie, in pixels: [4, points]."""
    ends = np.roll(quad, -1, 0) - quad
    normals = np.stack([ends[:, 1], -ends[:, 0]], 1) / np.hypot(*ends.T)[:, None]
    return ((points[None] - quad[:, None]) * normals[:, None]).sum(2)


def distances(quad, ink_YX, least):
    """How far the ink reaches out of each of the quad's four edges; negative where it stays in."""
    ys, xs = np.nonzero(ink_YX > least)
    points = np.stack([xs + 0.5, ys + 0.5], 1)
    return outward(quad, points).max(1)


def test_the_ink_of_each_line_fills_its_quad():
    checked, worst_out, gaps = 0, 0.0, []
    for key in range(24):
        made = document(key)
        for line, ink_YX in lines_with_ink(made):
            worst_out = max(worst_out, distances(line.quad, ink_YX, 100).max())
            is_cut = np.isclose(line.quad, 0) | np.isclose(line.quad, made.image.size)
            if not is_cut.any():  # thin strokes of small letters are pale
                gap = (-distances(line.quad, ink_YX, 30)).max()
                gaps.append(gap - BEND * min(made.page.size))
                checked += 1
    assert checked > 80
    assert worst_out < 1.0, "ink outside of its quad, in pixels"
    assert max(gaps) < 1.5, "a quad is loose, in pixels beyond what the page bends"


def test_the_photo_is_darker_where_a_quad_says_ink_is():
    contrasts = []
    for key in range(40, 54):
        made = document(key)
        gray_YX = np.asarray(made.image.convert("L"), float)
        for line, ink_YX in lines_with_ink(made):
            x1, y1 = np.floor(line.quad.min(0)).astype(int)
            x2, y2 = np.ceil(line.quad.max(0)).astype(int)
            ink = ink_YX[y1:y2, x1:x2] / 255
            if ink.std() > 0.05:
                contrasts.append(np.corrcoef(ink.ravel(), gray_YX[y1:y2, x1:x2].ravel())[0, 1])
    assert len(contrasts) > 40
    assert np.mean(contrasts) < -0.7
    assert np.percentile(contrasts, 95) < -0.35


def test_the_way_back_from_the_picture_is_exact():
    warp = random_warp((500, 300), (640, 480), (40, 60, 540, 360), random.Random(3))
    points = np.random.default_rng(0).uniform(0, 1, (50, 2)) * (500, 300)
    seen = warp.to_picture(points)
    assert np.abs(warp.to_page(seen) - points).max() < 1e-6
    assert np.abs(seen - points).max() > 5, "something moved"
    flat = Warp(
        (500, 300),
        (500, 300),
        [(0.0, 0.0), (500.0, 0.0), (500.0, 300.0), (0.0, 300.0)],
        np.zeros((2, 4)),
    )
    np.testing.assert_allclose(
        flat.quad((10, 20, 110, 50)), [[10, 20], [110, 20], [110, 50], [10, 50]]
    )


def test_a_line_that_leaves_the_picture_is_not_labelled(monkeypatch):
    blank = lambda page, warp, *_: Image.new("RGB", warp.picture)  # noqa: E731
    monkeypatch.setattr(page_photo, "_drawn", blank)
    counts = {"kept": 0, "left out": 0}
    for key in range(100):
        made = document(key)
        for line in made.lines:
            quad = line.quad
            assert (quad >= 0).all()
            assert (quad <= np.array(made.image.size)).all()
        for line in made.page.lines:
            quad = made.warp.quad(line.box)
            height = min(np.hypot(*(quad[3] - quad[0])), np.hypot(*(quad[2] - quad[1])))
            out = np.abs(np.clip(quad, 0, made.image.size) - quad).max()
            is_kept = any(line.text == kept.text for kept in made.lines)
            if out > OUTSIDE * height:
                counts["left out"] += 1
                assert not is_kept or sum(o.text == line.text for o in made.page.lines) > 1
            counts["kept"] += is_kept
        assert made.unlabelled == len(made.page.lines) - len(made.lines)
    assert counts["left out"] > 0
    assert counts["kept"] > 20 * counts["left out"]


def test_a_page_says_what_its_labels_say():
    text = "alpha beta gamma delta " * 40
    page = lay_out((400, 300), text, FONTS, (0.05, 0.08), 9, random.Random(1))
    assert 1 <= len(page.lines) <= 9
    joined = " ".join(line.text for line in page.lines)
    assert text.startswith(joined)
    for line in page.lines:
        assert line.ink.getbbox() == (0, 0, *line.ink.size), "the box is tight"
        assert line.ink.size == (line.box[2] - line.box[0], line.box[3] - line.box[1])
    for one in page.lines:
        for other in page.lines:
            apart = (
                one is other
                or one.box[2] <= other.box[0]
                or other.box[2] <= one.box[0]
                or one.box[3] <= other.box[1]
                or other.box[3] <= one.box[1]
            )
            assert apart, "lines never overlap"


def test_signs_that_no_font_has_are_neither_drawn_nor_said():
    page = lay_out(
        (400, 300), "ab\U0001fae0c de\u0e01 fg", FONTS, (0.08, 0.08), 9, random.Random(1)
    )
    assert " ".join(line.text for line in page.lines) == "abc de fg"


# --- text ---------------------------------------------------------------------------------------


def write_corpus(folder, files=60):
    for i in range(files):
        words = " ".join(f"word{i}x{j} and" for j in range(60))
        (folder / f"en{i}.txt").write_text(f"{words}\n", encoding="utf-8")
        (folder / f"zh{i}.md").write_text(f"第{i}页的中文内容，" * 60, encoding="utf-8")
    (folder / "russian.txt").write_text("Привет " * 200, encoding="utf-8")
    (folder / "data.bin").write_bytes(b"\0" * 99)


def test_a_corpus_keeps_training_and_held_out_text_apart(tmp_path):
    write_corpus(tmp_path)
    opened = corpus.open_corpus(tmp_path)
    assert {language: len(files) for language, files in opened.files.items()} == {
        "en": 60,
        "zh": 60,
    }
    seen = {"train": set(), "heldout": set()}
    for split, found in seen.items():
        for key in range(80):
            text = opened.text("en", split, random.Random(key))
            assert corpus.written_in(text) == "en"
            found |= set(re.findall(r"word(\d+)x", text))
    assert seen["train"] & seen["heldout"] == set()
    assert len(seen["train"]) > 20
    assert seen["heldout"]
    assert corpus.written_in(opened.text("zh", "train", random.Random(0))) == "zh"


def test_built_in_sentences_are_split_too():
    seen = {}
    for split in ("train", "heldout"):
        texts = [corpus.open_corpus(None).text("zh", split, random.Random(k)) for k in range(3)]
        seen[split] = {s for text in texts for s in text.replace("！", "。").split("。") if s}
    assert len(seen["train"] & seen["heldout"]) < 3, "only pieces of longer sentences"
    rng = random.Random(0)
    signs = {char for _ in range(3000) for char in written_text.sentence("zh", rng)}
    assert len(signs) > 2500, "rare signs are written as well"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("hello there", "en"),
        ("你好 world", None),
        ("你好，世界", "zh"),
        ("été déjà", None),
        ("12", None),
    ],
)
def test_language_of(text, language):
    assert corpus.written_in(text) == language


def test_missing_material_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no text"):
        Documents(1, "train", corpus=tmp_path)
    with pytest.raises(DataError, match=r"corpus .* does not exist"):
        Documents(1, "train", corpus=tmp_path / "none")
    with pytest.raises(DataError, match=r"photos .* does not exist"):
        Documents(1, "train", photos=tmp_path / "none")
    with pytest.raises(DataError, match=r"fonts .* does not exist"):
        Documents(1, "train", fonts=tmp_path / "none")
    with pytest.raises(DataError, match="languages of documents must be of en, zh"):
        Documents(1, "train", languages=("fr",))
    with pytest.raises(DataError, match="at least 64 pixels"):
        Documents(1, "train", page=PageSettings(short_side=(8, 9)))
    assert font_files.fonts_of("zh", tmp_path) == (Path(SHIPPED_FONT),), "the package's own"


# --- rows ---------------------------------------------------------------------------------------


def source(num=24, split="train", **settings):
    return Documents(num, split, page=SMALL, fonts=Path(SHIPPED_FONT).parent, **settings)


def test_rows_are_pure_and_become_samples():
    made, again = source(), source()
    assert made.fingerprint == again.fingerprint
    assert made.fingerprint != source(split="heldout").fingerprint
    tokenizer = load_tokenizer(NANO, slots=4)
    quad_id = tokenizer.encode_raw("<quad>")[0]
    seen = set()
    for index in range(24):
        row = made[index]
        assert row == decode_record(encode_record(row), "row")
        sample = tasks.example_of(row, tokenizer)
        lines = row.fields.get("lines", ())
        written = str(dict(row.fields)).count("<quad>") + len(lines)
        assert list(sample.ids).count(quad_id) == written
        seen.add((row.task, row.fields["language"]))
    assert {task for task, _ in seen} == {"ocr", "ocr_vqa", "vqa", "chat"}
    assert made[7] == again[7]
    with pytest.raises(IndexError):
        made[24]


def test_questions_are_settled_by_the_picture():
    kinds = set()
    for key in range(30):
        made = document(key)
        texts = [line.text for line in made.lines]
        task, fields = page_rows.fields_of("vqa", made, "en", random.Random(key))
        if task == "ocr":
            assert [text for text, _ in fields["lines"]] == texts
            continue
        question, answer = fields["question"], fields["answer"]
        said = question.split("“", 1)[-1].rsplit("”", 1)[0]
        if question.startswith("How many"):
            assert int(answer) == len(texts) == len(made.page.lines)
        elif question.startswith("Which line comes after"):
            assert sum(said in text for text in texts) == 1
            assert texts[texts.index(said) + 1] == answer
        elif "begins with" in question:
            assert [text for text in texts if said in text] == [answer]
            assert answer.startswith(said)
        else:
            assert answer == texts[0 if "first" in question else -1]
        kinds.add(question.split()[0] + question.split()[-1][:4])
    assert len(kinds) >= 3


def test_the_middle_of_each_character_lies_in_its_ink():
    checked = 0
    for key in range(12):
        for line in document(key).page.lines:
            xs = [x for x, _ in line.middles()]
            assert xs == sorted(xs)
            for n, char in enumerate(line.text):
                if char not in "HMNOSWZ":  # letters whose ink is centred in their advance
                    continue
                x1, _, x2, _ = line.font.getbbox(char)
                alone = line.font.getlength(line.text[:n]) + (x1 + x2) / 2
                start = line.box[0] - line.font.getbbox(line.text)[0]
                assert xs[n] == pytest.approx(start + alone, abs=0.1 * line.font.size)
                checked += 1
    assert checked > 8


def test_letters_are_one_token_a_cell_and_those_of_the_page():
    large = PageSettings((112, 112), (1.0, 1.0), (0.22, 0.34), 2)
    rows = Documents(
        20, "train", languages=("en",), tasks=("letters",), page=large, fonts=FONTS[0].parent
    )
    tokenizer = load_tokenizer(NANO)
    told, written = 0, 0
    for index in range(20):
        row, (made, *_) = rows[index], rows.document(index)
        if row.task == "ocr":
            assert made.unlabelled
            continue
        firsts, seconds = row.fields["firsts"], row.fields["seconds"]
        assert len(firsts) == len(seconds) == page_rows.CELLS**2
        text = "".join(line.text for line in made.page.lines).replace(" ", "")
        found = "".join(firsts + seconds).replace(page_rows.BLANK, "")
        assert not Counter(found) - Counter(text)
        told, written = told + len(found), written + len(text.replace(".", ""))
        top = min(line.quad[:, 1].min() for line in made.lines) / made.image.size[1]
        first_row = next(i for i, char in enumerate(firsts) if char != ".") // page_rows.CELLS
        assert first_row + 1 > top * page_rows.CELLS
        assert tasks.example_of(row, tokenizer).is_target.sum() == 2 * page_rows.CELLS**2 + 1
    assert told > 0.9 * written, "three characters in one cell are rare at this size"
