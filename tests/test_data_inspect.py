"""`qwenvl data inspect` and `qwenvl data stats`: pieces of a sample, the page, and the figures."""

import base64
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.cli import data
from qwenvl_jax.cli.data_stats import NOTHING_USABLE
from qwenvl_jax.cli.errors import SUCCESS, USAGE_ERROR
from qwenvl_jax.data import tasks
from qwenvl_jax.data.example import DataError, Example
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.row_sizes import (
    RowSizes,
    join_sizes,
    measure_rows,
    planned_rows,
    predicted_fill,
)
from qwenvl_jax.data.sample_page import Packing, sample_page
from qwenvl_jax.data.sample_pieces import pieces_of, places_by_picture
from qwenvl_jax.data.sources.conversations import Conversations
from qwenvl_jax.data.turns import CutTurns
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

NANO = "qwenvl_jax/assets/nano"
SHELF = "tests/data/conversations/shelf.json"
BROKEN = "tests/data/conversations/broken.json"
SLOTS = 5
RED = np.full((40, 60, 3), (255, 0, 0), np.uint8)
ALIEN = "<script>alert('x')</script>\" & </div>"


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer("configs/nano/scenes.tiktoken", slots=SLOTS)


def chat(tok: Tokenizer, *values: str, key: str = "k") -> Example:
    turns = [
        {"from": ("user", "assistant")[i % 2], "value": value} for i, value in enumerate(values)
    ]
    images = (RED,) * sum(value.count("<img>") for value in values)
    return tasks.example_of(Record(key, "chat", {"conversations": turns}, images), tok)


# --- pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", ["plain", "你好，猫 😀", "é\n\nb  c", "a<ref>b</ref><box>(1,2),(3,4)</box>", ""]
)
def test_pieces_join_to_the_ids_and_the_text(answer, tok):
    example = chat(tok, "Picture 1: <img>a</img>\nWhat?", answer)
    pieces = list(pieces_of(example, tok))
    assert [token for piece in pieces for token in piece.ids] == example.ids.tolist()
    assert sum(len(piece.ids) * piece.is_target for piece in pieces) == example.is_target.sum()
    text = "".join("<img></img>" if piece.kind == "picture" else piece.text for piece in pieces)
    assert text == tok.decode(example.ids)
    assert "\ufffd" not in text
    assert [len(piece.ids) for piece in pieces if piece.kind == "picture"] == [SLOTS + 2]


def test_a_character_of_several_tokens_is_one_piece(tok):
    example = tasks.to_example(tasks.plain_text("猫"), (), tok, "text", "k")
    first = next(iter(pieces_of(example, tok)))
    assert (first.text, len(first.ids)) == ("猫", 3)


def test_ids_that_are_no_whole_text_are_shown_too(tok):
    ids = np.array([tok.image_start_id, tok.image_pad_id, *tok.encode("猫")[:2]], np.int32)
    example = Example(ids, np.zeros(4, bool), (), "text", "k")
    pieces = list(pieces_of(example, tok))
    assert [piece.text for piece in pieces] == ["<img>", "<imgpad>", "\ufffd"]
    assert [token for piece in pieces for token in piece.ids] == ids.tolist()


def test_places_belong_to_the_picture_before_them(tok):
    box = "<ref>{}</ref><box>(1,2),(3,4)</box>"
    picture = "<img>a</img>\n"
    example = chat(
        tok,
        f"{box.format('before')} Picture 1: {picture}",
        box.format("one"),
        f"Picture 2: {picture}Picture 3: {picture}",
        f"{box.format('three')}<box>(5,6),(7,8)</box>",
    )
    places = places_by_picture(list(pieces_of(example, tok)), 3)
    assert [[place["ref"] for place in one] for one in places] == [["one"], [], ["three", "three"]]
    assert places_by_picture(list(pieces_of(example, tok)), 0) == []


# --- the page -------------------------------------------------------------------------------------


class Outline(html.parser.HTMLParser):
    """Fails on tags that do not close in order; keeps what a reader would see."""

    VOID = ("meta", "input", "img", "br")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return outline


def pictures_of(outline: Outline) -> list[np.ndarray]:
    sources = [attrs["src"] for tag, attrs in outline.tags if tag == "img"]
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))
        for source in sources
    ]


def test_the_page_shows_everything_as_text_and_needs_no_other_file(tok):
    question = f"Picture 1: <img>{ALIEN}</img>\n{ALIEN}"
    samples = [chat(tok, question, ALIEN, key=ALIEN), DataError(ALIEN)]
    page = sample_page(ALIEN, [ALIEN], samples, tok)
    outline = outline_of(page)
    assert {"script", "link", "iframe"} & {tag for tag, _ in outline.tags} == set()
    assert not any(name.startswith("on") for _, attrs in outline.tags for name in attrs)
    assert outline.text.count("<script>alert('x')</script>") == 7
    # as title, heading, note, key, question, answer and refusal
    assert len(re.findall(r"(?:src|href)=\"(?!data:|#)", page)) == 0
    assert "url(" not in page


def test_learnt_tokens_are_marked_and_slots_shortened(tok):
    example = chat(tok, "Picture 1: <img>a</img>\nWhat?", "A star\nhere")
    page = sample_page("t", [], [example], tok)
    body = page[page.index('<div class="text"') :]
    learnt = re.findall(r'<span class="(?:s )?t" title="[^"]*">(.*?)</span>', body, re.S)
    text = html.unescape("".join(learnt)).replace('<i class="n">↵</i>', "")
    assert text == tok.decode(example.ids[example.is_target])
    assert body.count("imgpad") == 0
    assert f"picture 1: {SLOTS} slots" in body
    assert f"{len(example.ids)} tokens, {example.is_target.sum()} learnt, 1 picture<" in page


def test_boxes_are_drawn_on_their_picture(tok):
    plain = chat(tok, "Picture 1: <img>a</img>\nWhat?", "no place")
    boxed = chat(tok, "Picture 1: <img>a</img>\nWhat?", "<box>(200,200),(800,800)</box>")
    both = pictures_of(outline_of(sample_page("t", [], [plain, boxed], tok)))
    is_red = [np.abs(picture.astype(int) - (255, 0, 0)).max(axis=-1) < 40 for picture in both]
    assert is_red[0].all()
    height, width = is_red[1].shape
    assert not is_red[1][height // 2, round(0.2 * width)]
    assert is_red[1][height // 2, width // 2]
    assert both[0].shape[1] == 336  # small pictures are enlarged


def test_a_picture_that_cannot_be_read_is_told_in_its_place(tok):
    example = chat(tok, "Picture 1: <img>a</img>\nWhat?", "x")._replace(images=(Path("no.png"),))
    outline = outline_of(sample_page("t", [], [example], tok))
    assert pictures_of(outline) == []
    assert "no.png" in outline.text
    assert "does not exist" in outline.text


def test_packed_rows_show_where_samples_begin_and_end(tok):
    samples = [chat(tok, "a", "b" * n) for n in (1, 30, 60)]
    sizes = [len(sample.ids) for sample in samples]
    page = sample_page("t", [], samples, tok, Packing([[2, 0]], 200, 4))
    end = sizes[2] + sizes[0]
    assert f"row 0, tokens 0 to {sizes[2] - 1}<" in page
    assert f"row 0, tokens {sizes[2]} to {end - 1}<" in page
    assert page.count("fits into no row") == 1
    assert f"{end} of 200 tokens, {end / 200:.1%}; 0 of 4 pictures" in page
    widths = [float(width) for width in re.findall(r'style="width:([\d.]+)%"', page)]
    assert widths == pytest.approx([100 * sizes[2] / 200, 100 * sizes[0] / 200], abs=1e-3)
    with pytest.raises(ValueError, match="holds sample 0, which cannot be used"):
        sample_page("t", [], [DataError("x")], tok, Packing([[0]], 9, 1))


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_writes_a_page_and_the_same_seed_the_same_one(tmp_path, capsys):
    pages = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        output = tmp_path / f"{name}.html"
        words = [SHELF, "--num", "3", "--seed", str(seed), "--output", str(output), "--packed"]
        assert data.main(["inspect", *words]) == SUCCESS
        pages.append(output.read_text(encoding="utf-8").replace(f"seed {seed}", ""))
    assert pages[0] == pages[1] != pages[2]
    assert outline_of(pages[0]).text.count(" learnt,") >= 2
    assert "wrote 3 samples to" in capsys.readouterr().out


def test_inspect_shows_rows_that_cannot_be_used(tmp_path):
    output = tmp_path / "page.html"
    assert data.main(["inspect", BROKEN, "--output", str(output), "--packed"]) == SUCCESS
    text = outline_of(output.read_text(encoding="utf-8")).text
    assert text.count("not usable") == 4
    assert "turn 0 must be" in text
    assert "left of or above its first: got <box>(875,685),(625,925)</box>" in text


@pytest.mark.parametrize(
    ("source", "setting"),
    [("collages", "--generated.side=80"), ("documents", "--generated.page.max-lines=3")],
)
def test_inspect_shows_generated_rows(source, setting, tmp_path):
    output = tmp_path / "page.html"
    words = ["inspect", source, "--num", "3", "--output", str(output)]
    assert data.main([*words, setting]) == SUCCESS
    assert f"{source}/train/" in output.read_text(encoding="utf-8")


def test_inspect_of_scenes_has_every_task(tmp_path):
    output = tmp_path / "page.html"
    assert data.main(["inspect", "scenes", "--num", "12", "--output", str(output)]) == SUCCESS
    page = output.read_text(encoding="utf-8")
    shown = re.findall(r'<span class="task">(\w+)</span>', page)
    assert len(set(shown)) == 12
    words = ["inspect", "scenes", "--num", "3", "--task", "ocr", "--output", str(output)]
    assert data.main(words) == SUCCESS
    page = output.read_text(encoding="utf-8")
    assert re.findall(r'<span class="task">(\w+)</span>', page) == ["ocr"] * 3
    assert len(pictures_of(outline_of(page))) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "nothing.json"], "no data at 'nothing.json'"),
        (["inspect", "tests"], "folder without index.json"),
        (["inspect", "collage"], "no data at 'collage': .* did you mean 'collages'?"),
        (["inspect", SHELF, "--task", "captoin"], "no row of task 'captoin' .* got tasks chat"),
        (["inspect", "scenes", "--task", "captoin"], "unknown task of the scenes"),
        (["inspect", "scenes", "--generated.emoji"], "has no effect on 'scenes'"),
        (["inspect", "documents", "--generated.emoji"], "emoji has no effect on documents"),
        (["inspect", SHELF, "--num", "0"], "--num must be positive"),
        (["inspect", SHELF, "--max-images", "-1"], "--max-images must not be negative"),
        (["inspect", SHELF, "--output", "nowhere/a.html"], "no folder for the page"),
        (["stats", "nothing.json"], "no data at 'nothing.json'"),
        (["stats", SHELF, "--num", "0"], "--num must be positive"),
        (["stats", SHELF, "--length", "-3"], "--length must be positive"),
        (["stats", SHELF, "--max-images", "-3"], "--max-images must be positive: got -3"),
        (["stats", SHELF, "--max-images", "0"], "--max-images must be positive: got 0"),
    ],
)
def test_wrong_options_are_one_line(words, told, capsys, tmp_path, monkeypatch):
    assert data.main(words) == USAGE_ERROR
    error = capsys.readouterr().err
    assert re.search(told, error)
    assert error.count("\n") == 1


# --- stats ----------------------------------------------------------------------------------------


def test_measured_sizes_are_those_of_the_samples(tok):
    source = Conversations(SHELF)
    sizes = measure_rows(source, tok, [5, 2, 0], None, range(1, 3))
    for place, row in enumerate((2, 0)):
        example = tasks.example_of(source[row], tok)
        assert sizes.tokens[place] == len(example.ids)
        assert sizes.learnt[place] == example.is_target.sum()
        assert sizes.pictures[place] == len(example.images)
    joined = join_sizes([sizes, measure_rows(source, tok, range(6), None, range(6))])
    assert len(joined.tokens) == len(joined.tasks) == 8
    assert joined.tokens.dtype == np.int32
    broken = measure_rows(Conversations(BROKEN), tok, range(7), 900, range(7))
    assert np.flatnonzero(broken.tokens < 0).tolist() == [0, 2, 3, 4]
    assert len(broken.reasons) == 4


def test_long_dialogues_are_packed_as_a_run_that_cuts_them_does(tok):
    source, length = Conversations(BROKEN), 100
    sizes = measure_rows(source, tok, [5, 6], length, range(2))
    cut = CutTurns(source, tok, length)
    assert sizes.tokens[1] == len(tasks.example_of(source[6], tok).ids) > length
    assert sizes.packed[0, 1] == len(tasks.example_of(cut[6], tok).ids) <= length
    assert sizes.packed[1, 1] == len(cut[6].images) < sizes.pictures[1]
    assert sizes.packed[:, 0].tolist() == [sizes.tokens[0], sizes.pictures[0]]
    fill = predicted_fill(sizes, length, 9)
    assert (fill.cut, fill.too_long) == (1, 0)
    fill = predicted_fill(measure_rows(source, tok, [5, 6], None, range(2)), length, 9)
    assert (fill.cut, fill.too_long) == (0, 1)
    fill = predicted_fill(measure_rows(source, tok, [5, 6], 9, range(2)), 9, 9)
    assert (fill.cut, fill.too_long) == (0, 2), "not even the first turns fit"


def test_stats_cut_long_dialogues_unless_told_otherwise(capsys):
    words = ["stats", BROKEN, "--length", "400"]
    assert data.main(words) == SUCCESS
    assert re.search(
        r"packed into \d rows .*; cut at their last turns: 1 dialogue$", capsys.readouterr().out
    )
    assert data.main([*words, "--no-cut-turns"]) == SUCCESS
    assert "; 1 too long or with too many pictures" in capsys.readouterr().out


def test_a_run_gives_the_slots_of_its_model(tmp_path, capsys):
    (tmp_path / "qwen.tiktoken").write_bytes(Path(NANO, "qwen.tiktoken").read_bytes())
    run = {"model": {"adapter": {"num_queries": 36}}, "steps": 3}
    (tmp_path / "config.json").write_text(json.dumps(run))
    assert data.main(["stats", SHELF, "--tokenizer", str(tmp_path), "--json"]) == SUCCESS
    assert json.loads(capsys.readouterr().out)["slots"] == 36


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("[]", "config.json is damaged: expected an object, got []; give --slots, or mend it"),
        ("{", "config.json is not readable as JSON: "),
        ('{"visual": {"n_queries": 0}}', "positive whole number as visual.n_queries, got 0; give"),
        ('{"adapter": {"num_queries": true}}', "number as adapter.num_queries, got True; give"),
        ('{"model": {"adapter": {"num_queries": "36"}}}', "adapter.num_queries, got '36'; give"),
    ],
)
def test_a_damaged_config_does_not_give_the_slots(config, told, tmp_path, capsys):
    (tmp_path / "qwen.tiktoken").write_bytes(Path(NANO, "qwen.tiktoken").read_bytes())
    (tmp_path / "config.json").write_text(config)
    words = ["stats", SHELF, "--tokenizer", str(tmp_path), "--json"]
    assert data.main(words) == USAGE_ERROR
    assert told in capsys.readouterr().err
    assert data.main([*words, "--slots", "9"]) == SUCCESS
    assert json.loads(capsys.readouterr().out)["slots"] == 9


def sizes_of(tokens: list[int], pictures: list[int]) -> RowSizes:
    tokens_N, pictures_N = np.array(tokens, np.int32), np.array(pictures, np.int32)
    return RowSizes(
        tokens_N, tokens_N, pictures_N, ["chat"] * len(tokens), [], np.stack([tokens_N, pictures_N])
    )


def test_predicted_fill_is_exact_where_it_can_be_told_by_hand():
    fill = predicted_fill(sizes_of([50] * 10, [1] * 10), 100, 4)
    assert (fill.rows, fill.tokens, fill.images, fill.samples_per_row) == (5, 1.0, 0.5, 2.0)
    fill = predicted_fill(sizes_of([60, 101, 50], [1, 0, 9]), 100, 4)
    assert (fill.tokens, fill.samples_per_row, fill.too_long) == (0.6, 1.0, 2)
    fill = predicted_fill(sizes_of([100], [1]), 100, 1)  # both limits are reached, not passed
    assert (fill.tokens, fill.images, fill.too_long) == (1.0, 1.0, 0)
    fill = predicted_fill(sizes_of([10] * 4, [2] * 4), 100, 4)  # pictures bound it
    assert (fill.tokens, fill.images) == (0.2, 1.0)
    assert predicted_fill(sizes_of([500, -1], [0, -1]), 100, 4) == (0, 0, 0, 0, 1, 0)
    assert predicted_fill(sizes_of([10] * 20, [0] * 20), 100, 0).images == 1.0


def test_planned_rows_hold_every_sample_once_within_both_limits():
    rng = np.random.default_rng(3)
    tokens, pictures = rng.integers(1, 60, 300).tolist(), rng.integers(0, 4, 300).tolist()
    rows = planned_rows(tokens, pictures, 100, 5)
    assert sorted(number for row in rows for number in row) == list(range(300))
    assert max(sum(tokens[i] for i in row) for row in rows) <= 100
    assert max(sum(pictures[i] for i in row) for row in rows) <= 5
    fill = predicted_fill(sizes_of(tokens, pictures), 100, 5)
    assert fill.rows == len(rows)
    assert fill.tokens == pytest.approx(sum(tokens) / (100 * len(rows)))
    assert planned_rows([], [], 100, 5) == []


def test_stats_as_json_add_up(capsys):
    assert data.main(["stats", SHELF, "--tokenizer", NANO, "--json"]) == SUCCESS
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == told["measured"] == 6
    assert told["slots"] == 64
    assert told["tasks"] == {"chat": 6}
    assert told["pictures"] == {"0": 1, "1": 4, "3": 1}
    assert sum(part["rows"] for part in told["histogram"]) == 6
    assert told["tokens"]["p0"] <= told["tokens"]["p50"] <= told["tokens"]["p100"]
    assert told["longest"][0]["tokens"] == told["tokens"]["p100"]
    assert told["longest"][0]["key"] == "shelf.json[2] (line 44, id 'shelf_2')"
    assert 0 < told["packing"]["tokens"] <= 1


def test_stats_as_text_tell_what_is_unusable_and_whose_tokens_they_are(capsys):
    assert data.main(["stats", BROKEN]) == SUCCESS
    out = capsys.readouterr().out
    assert "unusable: 4 rows" in out
    assert "name your model's with --tokenizer" in out
    assert "; 1 too long or with too many pictures" in out
    assert re.search(r"^ +\d+ to +\d+ +\d+  #+$", out, re.M)


def test_stats_of_a_sample_and_of_nothing_usable(tmp_path, capsys):
    assert data.main(["stats", SHELF, "--num", "2", "--seed", "5"]) == SUCCESS
    assert "6 rows, 2 of them measured" in capsys.readouterr().out
    path = tmp_path / "rows.json"
    assert data.main(["stats", SHELF, "--length", "9"]) == SUCCESS
    out = capsys.readouterr().out
    assert "no sample fits into a row of 9 tokens and 8 pictures; 6 too long" in out
    path.write_text('[{"id": 1}]')
    assert data.main(["stats", str(path)]) == NOTHING_USABLE
    assert "no row can be used" in capsys.readouterr().out


# --- other sources --------------------------------------------------------------------------------


def test_a_prepared_folder_gives_the_figures_and_pictures_of_its_file(tmp_path, capsys):
    folder = tmp_path / "prepared"
    assert data.main(["prepare", SHELF, str(folder), "--num-workers", "1"]) == SUCCESS
    capsys.readouterr()
    told = []
    for source in (SHELF, str(folder)):
        assert data.main(["stats", source, "--json"]) == SUCCESS
        told.append(json.loads(capsys.readouterr().out))
    for name in ("tokens", "learnt", "histogram", "pictures", "tasks", "longest", "packing"):
        assert told[0][name] == told[1][name]
    output = tmp_path / "page.html"
    assert data.main(["inspect", str(folder), "--output", str(output)]) == SUCCESS
    assert len(pictures_of(outline_of(output.read_text(encoding="utf-8")))) == 7
