"""Streams of web data: what is read, what is refused, and that no shape of damage stops them."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_rows import picture

import qwenvl_jax
from qwenvl_jax.cli.data import main
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record, encode_record
from qwenvl_jax.data.sources.eval_files import EvalFile
from qwenvl_jax.data.sources.lines import ranges, read_lines
from qwenvl_jax.data.sources.open_stream import open_stream
from qwenvl_jax.data.sources.pairs import Span, grounded_phrases, rows_of, without_nesting
from qwenvl_jax.data.sources.parquet_files import ParquetFiles
from qwenvl_jax.data.sources.prepared import Prepared
from qwenvl_jax.data.sources.stream import First, Refusal, find_files
from qwenvl_jax.data.sources.tar_shards import TarShards
from qwenvl_jax.data.sources.text_files import TextFiles, pieces
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.prompt.tokenizer import load_tokenizer

NANO = Path(qwenvl_jax.__file__).parent / "assets" / "nano"
JPG = picture()

CAPTION = "a dog in a field of flowers"
GRIT = {
    "caption": CAPTION,
    "noun_chunks": [
        [0, 5, 0.1, 0.2, 0.5, 0.6, 0.9],
        [9, 16, 0.0, 0.5, 1.0, 1.0, 0.7],
        [0, 5, 0.6, 0.2, 0.9, 0.6, 0.8],
    ],
    "ref_exps": [[0, 27, 0.1, 0.2, 0.5, 0.6, 0.9]],
    "clip_similarity_vitb32": 0.31,
}


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(stream) -> list[Record | DataError]:
    return [row for shard in stream.shards() for row in stream.read(shard)]


def rows_and_reasons(stream) -> tuple[list[Record], list[str]]:
    read_rows = read(stream)
    rows = [row for row in read_rows if isinstance(row, Record)]
    return rows, [row.reason for row in read_rows if isinstance(row, Refusal)]


# --- tar ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
def test_tar_members_are_grouped_by_name(tmp_path, ending, mode):
    members = {
        "a/000.jpg": JPG,
        "a/000.txt": "ein Stern, 一颗星".encode(),
        "a/000.json": json.dumps({"similarity": 0.3, "caption": "other"}).encode(),
        "a/001.cls.png": JPG,
        "a/002.PNG": picture(form="PNG"),
        "a/002.json": b'{"caption": "only json"}',
    }
    write_tar(tmp_path / f"00000.{ending}", members, mode)
    rows, reasons = rows_and_reasons(TarShards(tmp_path))
    assert [row.key for row in rows] == [f"00000.{ending}/a/000", f"00000.{ending}/a/002"]
    assert rows[0].images == (JPG,)
    assert rows[0].fields == {"text": "ein Stern, 一颗星", "language": "zh", "clip_score": 0.3}
    assert rows[1].fields["text"] == "only json"
    assert reasons == ["no picture"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"1.jpg": JPG, "1.txt": b"\xff\xfe"}, "broken member"),
        ({"1.jpg": JPG, "1.json": b"[1]"}, "broken member"),
        ({"1.jpg": JPG, "1.json": b"[" * 100_000}, "broken member"),
        ({"1.jpg": b"", "1.txt": b"hello"}, "no picture"),
        ({"1.txt": b"hello"}, "no picture"),
        ({"1.jpg": JPG, "1.txt": b" \n"}, "no text"),
        (
            {"1.jpg": JPG, "1.json": b'{"status": "failed", "error_message": "404"}'},
            "not downloaded",
        ),
        ({"1.jpg": JPG, "1.txt": b"a", "1.json": b'{"similarity": "x"}'}, "broken score"),
        (
            {"1.jpg": JPG, "1.txt": b"a", "1.json": b'{"similarity": 1' + b"0" * 400 + b"}"},
            "broken score",
        ),
        ({"1.jpg": JPG, "1.json": b'{"captions": 5}'}, "no text"),
    ],
)
def test_broken_samples_are_refused_and_the_next_is_read(tmp_path, members, reason):
    write_tar(tmp_path / "0.tar", members | {"2.jpg": JPG, "2.txt": b"fine"})
    rows, reasons = rows_and_reasons(TarShards(tmp_path / "0.tar"))
    assert reasons == [reason]
    assert [row.key for row in rows] == ["0.tar/2"]


def test_a_tar_cut_anywhere_gives_what_it_holds_and_says_so(tmp_path):
    names = [
        (f"{i}.{kind}", data) for i in range(3) for kind, data in [("jpg", JPG), ("txt", b"a")]
    ]
    path = write_tar(tmp_path / "0.tar", dict(names))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for size in [*range(512, end + 1, 512), *range(511, end, 512)]:
        path.write_bytes(whole[:size])
        rows, reasons = rows_and_reasons(TarShards(path))
        assert len(rows) < 3  # the last one might have had more members
        assert reasons[-1] == "damaged shard", size
    for place in range(0, end, 512):  # a header or a picture, all zeros or all ones
        path.write_bytes(whole[:place] + b"\xff" * 512 + whole[place + 512 :])
        rows, reasons = rows_and_reasons(TarShards(path))
        assert len(rows) == 3 or reasons[-1] in ("damaged shard", "broken member")


def test_a_file_that_is_no_tar_is_refused(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>not found</html>" * 100)
    assert rows_and_reasons(TarShards(tmp_path)) == ([], ["damaged shard"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar or .* files: got a folder without"):
        TarShards(tmp_path / "empty")


# --- parquet --------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    ("columns", "text", "score"),
    [
        ({"caption": ["a cat"], "similarity": [0.33]}, "a cat", 0.33),  # LAION
        ({"text": ["a cat"], "clip_similarity_vitb32": [0.3]}, "a cat", 0.3),  # COYO
        ({"text": ["a cat"], "clip_b32_similarity_score": [0.2]}, "a cat", 0.2),  # DataComp
        ({"caption": ["a cat"]}, "a cat", None),  # CC12M
        ({"top_caption": ["a cat"], "all_captions": [["a cat", "a big cat"]]}, "a cat", None),
    ],
)
def test_columns_of_the_web_sets_are_known(tmp_path, columns, text, score):
    everything = columns | {"jpg": [JPG], "key": ["000000017"], "url": ["x"], "exif": ["{}"]}
    write_parquet(tmp_path / "00000.parquet", everything)
    rows, reasons = rows_and_reasons(ParquetFiles(tmp_path))
    assert reasons == []
    assert rows[0].key == "00000.parquet/000000017"
    assert rows[0].images == (JPG,)
    assert rows[0].fields["text"] == text
    assert rows[0].fields.get("clip_score") == score
    if "all_captions" in columns:
        assert rows[0].fields["texts"] == ["a cat", "a big cat"]


def test_pictures_in_a_struct_and_missing_ones(tmp_path):
    images = [{"bytes": JPG, "path": None}, None, {"bytes": None, "path": "x.jpg"}]
    write_parquet(tmp_path / "a.parquet", {"image": images, "text": ["a", "b", "c"]})
    rows, reasons = rows_and_reasons(ParquetFiles(tmp_path / "a.parquet"))
    assert [row.key for row in rows] == ["a.parquet/0"]
    assert reasons == ["no picture"] * 2


def test_text_that_is_not_utf8_costs_its_row(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.string(), safe=False)
    columns = {"jpg": [JPG] * 3, "caption": texts}
    rows, reasons = rows_and_reasons(ParquetFiles(write_parquet(tmp_path / "a.parquet", columns)))
    assert [row.key for row in rows] == ["a.parquet/0", "a.parquet/2"]
    assert reasons == ["not UTF-8"]


def test_parquet_of_addresses_is_told(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"url": ["x"], "text": ["a"]})
    with pytest.raises(DataError, match="holds no pictures: got the columns url, text"):
        read(ParquetFiles(path))


@pytest.mark.parametrize("damage", ["cut", "middle", "html"])
def test_damaged_parquet_is_refused(tmp_path, damage):
    columns = {"jpg": [picture(seed=i) for i in range(9)], "caption": [f"no {i}" for i in range(9)]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    data = bytearray(path.read_bytes())
    if damage == "middle":
        middle = data.find(columns["jpg"][4][:40])
        data[middle - 60 : middle] = bytes(60)
    path.write_bytes({"cut": data[:-9], "html": b"<html>", "middle": data}[damage])
    rows, reasons = rows_and_reasons(ParquetFiles(path))
    assert reasons == ["damaged shard"]
    assert len(rows) < 9


# --- GRIT -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_grit_gives_three_kinds_of_rows(tmp_path, form):
    if form == "tar":
        members = {"7.jpg": JPG, "7.json": json.dumps(GRIT).encode()}
        rows, reasons = rows_and_reasons(TarShards(write_tar(tmp_path / "0.tar", members)))
    else:
        columns = {"jpg": [JPG], "key": ["7"], **{name: [value] for name, value in GRIT.items()}}
        rows, reasons = rows_and_reasons(ParquetFiles(write_parquet(tmp_path / "0.pq", columns)))
    assert reasons == []
    two, field = [[100, 200, 500, 600], [600, 200, 900, 600]], [0, 500, 999, 999]
    assert [(row.key.split("/", 1)[1], row.task) for row in rows] == [
        ("7/caption", "grounded_caption"),
        ("7/find0", "ref_grounding"),
        ("7/name0.0", "grounded_captioning"),
    ]
    phrases = [["a dog", two], [" in", []], [" a field", [field]], [" of flowers", []]]
    assert rows[0].fields == {"phrases": phrases, "clip_score": 0.31}
    assert rows[1].fields == {"phrase": CAPTION, "boxes": [two[0]], "clip_score": 0.31}
    assert rows[2].fields == {"box": two[0], "text": CAPTION, "clip_score": 0.31}
    tokenizer = load_tokenizer(NANO, slots=2)
    assert all(example_of(row, tokenizer).is_target.any() for row in rows)


@pytest.mark.parametrize(
    "place",
    [
        [0, 99, 0.1, 0.1, 0.2, 0.2, 1.0],
        [5, 5, 0.1, 0.1, 0.2, 0.2, 1.0],
        [0, 5, 0.1, 0.1, 0.1, 0.2, 1.0],
        [0, 5, 0.1, float("nan"), 0.3, 0.2, 1.0],
        [0, 5],
        None,
    ],
)
def test_broken_places_are_refused(tmp_path, place):
    row = {"caption": CAPTION, "noun_chunks": [place]}
    members = {"7.jpg": JPG, "7.json": json.dumps(row).encode()}
    _, reasons = rows_and_reasons(TarShards(write_tar(tmp_path / "0.tar", members)))
    assert reasons == ["broken box"]


spans = st.lists(
    st.builds(
        lambda start, length, boxes: Span(start, start + length, ((1, 2, 3, 4),) * boxes),
        st.integers(0, 12),
        st.integers(1, 6),
        st.integers(1, 3),
    ),
    max_size=7,
)


@given(spans)
def test_greedy_keeps_as_many_spans_as_any_choice(some):
    def is_flat(chosen):
        ordered = sorted(chosen, key=lambda span: span.start)
        return all(a.end <= b.start for a, b in itertools.pairwise(ordered))

    kept = without_nesting(some)
    assert is_flat(kept)
    best = max(
        number
        for number in range(len(some) + 1)
        if any(is_flat(chosen) for chosen in itertools.combinations(some, number))
    )
    assert len(kept) == best


@given(spans)
def test_phrases_join_to_the_text(some):
    text = "ab cd ef gh ij kl mn"
    phrases = grounded_phrases(text, without_nesting(some))
    assert "".join(words for words, _ in phrases) == text
    assert all(words for words, _ in phrases)


# --- evaluation files -----------------------------------------------------------------------------


def test_files_of_the_evaluation_scripts(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "1.jpg").write_bytes(JPG)
    lines = [
        {"image": "coco/1.jpg", "question": "What?", "answer": "a cat", "question_id": 3},
        {"image": "coco/1.jpg", "question": "What?", "answers": ["b", "a", "a"]},
        {"image": "coco/1.jpg", "question": "What?", "answers": [{"answer": "x"}]},
        {"image": "coco/1.jpg", "sent": "cat", "bbox": [8, 7, 80, 35], "width": 80, "height": 70},
        {"image": "coco/1.jpg", "caption": "一只猫"},
        {"image": "coco/1.jpg", "question": "hidden?", "question_id": 4},
        {"image": 3, "caption": "a"},
        {"image": "coco/1.jpg", "sent": "cat", "bbox": [0, 0, 10**400, 5], "width": 8, "height": 7},
        {"image": "coco/1.jpg", "question": 5, "answer": "a"},
        {"image": "coco/1.jpg", "caption": None},
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n{\n")
    rows, reasons = rows_and_reasons(EvalFile(path))
    assert reasons == ["no answer", *["broken line"] * 3, "no text", "broken line"]
    assert [row.fields.get("answer") for row in rows[:3]] == ["a cat", "a", "x"]
    assert rows[3].fields == {"phrase": "cat", "boxes": [[100, 100, 999, 500]]}
    assert rows[4].fields == {"text": "一只猫", "language": "zh"}
    assert JPG in encode_record(rows[0])


def test_captions_as_coco_writes_them(tmp_path):
    notes = [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "a longer one"}]
    notes += [{"image_id": 2, "caption": None}, {"image_id": 3, "caption": "a"}]
    images = [{"id": 1, "image": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]
    images.append({"id": 3, "file_name": 7})
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    rows, reasons = rows_and_reasons(EvalFile(path, tmp_path / "pictures"))
    assert rows[0].fields["texts"] == ["a", "a longer one"]
    assert rows[0].images == (tmp_path / "pictures" / "1.jpg",)
    assert reasons == ["no text", "broken line"]
    path.write_text('{"images": 3}')
    with pytest.raises(DataError, match="is not a caption file"):
        read(EvalFile(path))


# --- text -----------------------------------------------------------------------------------------


@given(st.lists(st.text("ab\n\r 一", max_size=30), max_size=12), st.integers(1, 40))
def test_ranges_of_a_text_file_hold_each_document_once(tmp_path_factory, parts, size):
    root = tmp_path_factory.mktemp("text")
    path = root / "a.txt"
    path.write_bytes("".join(parts).encode())
    stream = TextFiles(path)
    whole = [row.fields for row in read(stream) if isinstance(row, Record)]
    cut = [row for shard in ranges([path], root, size) for row in stream.read(shard)]
    assert [row.fields for row in cut if isinstance(row, Record)] == whole
    assert len({row.key for row in cut if isinstance(row, Record)}) == len(whole)
    lines = [line for shard in ranges([path], root, size) for _, line in read_lines(shard, root)]
    assert b"".join(lines) == path.read_bytes()


def test_documents_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n \nthree\r\n\r\n\xff\n\nfour")
    (tmp_path / "b.jsonl").write_text('{"text": "五"}\n\n{"text": 6}\n{}\n[]\n{"text": "seven"}')
    rows, reasons = rows_and_reasons(TextFiles(tmp_path))
    texts = [row.fields["text"] for row in rows]
    assert texts == ["one\ntwo", "three", "four", "五", "seven"]
    assert reasons == ["not UTF-8", "broken line", "broken line", "broken line"]
    assert rows[0].key == "a.txt@0.0"


@given(st.text("ab .。\n", max_size=400), st.integers(8, 50))
def test_pieces_keep_every_word(document, most):
    cut = list(pieces(document, most))
    assert all(0 < len(piece) <= most for piece in cut)
    assert "".join("".join(cut).split()) == "".join(document.split())


def test_a_long_document_without_blank_lines_is_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line of some words\n" * 200_000)
    assert sum(len(row.fields["text"].split()) for row in read(TextFiles(path))) == 1_000_000


@given(st.lists(st.text("ab\n ", max_size=30), max_size=12), st.integers(1, 40))
def test_no_range_loses_the_rest_of_a_document_that_was_cut(tmp_path_factory, parts, size):
    root = tmp_path_factory.mktemp("long")
    path = root / "a.txt"
    path.write_bytes("".join(parts).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwenvl_jax.data.sources.text_files.MAX_DOCUMENT", 5)
        rows = [row for shard in ranges([path], root, size) for row in TextFiles(path).read(shard)]
    found = "".join(row.fields["text"] for row in rows if isinstance(row, Record))
    assert "".join(found.split()) == "".join("".join(parts).split())
    assert len({row.key for row in rows if isinstance(row, Record)}) == len(rows)


def test_marks_of_other_editors_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\nthree".encode())
    assert [row.fields["text"] for row in read(TextFiles(tmp_path))] == ["one\ntwo", "three"]
    captions = {
        "images": [{"id": 1, "image": "a.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a dog"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(captions), encoding="utf-8-sig")
    stream = open_stream(tmp_path / "c.json")
    assert isinstance(stream, EvalFile)
    assert [row.fields["text"] for row in read(stream)] == ["a dog"]


def test_a_text_in_the_place_of_several_is_one():
    (row,) = rows_of("k", JPG, {"captions": "a dog"})
    assert row.fields == {"text": "a dog", "language": "en"}


def test_a_table_of_addresses_is_refused_and_no_file_of_this_machine_is_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(JPG)
    table = pyarrow.table({"image": [str(tmp_path / "secret.png")], "caption": ["a dog"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="its column image holds text, expected the bytes"):
        read(ParquetFiles(tmp_path))


def test_folders_within_a_tar_are_no_rows(tmp_path):
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / "1.jpg").write_bytes(JPG)
    (tmp_path / "in" / "x" / "1.txt").write_text("a dog")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    assert [row.key for row in read(TarShards(tmp_path))] == ["a.tar/in/x/1"]


def test_folders_of_such_names_are_no_files_and_links_are_followed_once(tmp_path):
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "apart").mkdir()
    (tmp_path / "in" / "1.tar").mkdir()
    (tmp_path / "in" / "notes.txt").mkdir()
    (tmp_path / "in" / "x" / "a.txt").write_text("hello")
    (tmp_path / "apart" / "b.txt").write_text("world")
    (tmp_path / "in" / "y").symlink_to(tmp_path / "apart")
    (tmp_path / "in" / "x" / "round").symlink_to(tmp_path / "in")
    stream = open_stream(tmp_path / "in")
    assert type(stream) is TextFiles
    found = find_files(tmp_path / "in", (".txt",))
    assert found == [tmp_path / "in" / "x" / "a.txt", tmp_path / "in" / "y" / "b.txt"]


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg", "x" * 5000])
def test_a_picture_whose_path_is_none_is_a_row_refused(tmp_path, name):
    with pytest.raises(DataError, match="has a picture that cannot be read"):
        encode_record(Record("k", "vqa", {"question": "?", "answer": "a"}, (tmp_path / name,)))


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.tar", b"", TarShards),
        ("a.parquet", b"", ParquetFiles),
        ("a.txt", b"hello", TextFiles),
        ("a.jsonl", b'{"text": "hello"}\n', TextFiles),
        ("a.jsonl", b'{"image": "x", "question": "?"}\n', EvalFile),
        ("a.json", b'{"images": []}', EvalFile),
        ("a.json", b'[{"conversations": []}]', None),
        ("a.jsonl", b'{"id": 1, "conversations": []}\n', None),
        ("a.jsonl", b"not json", None),
        ("index.json", b"{}", None),
    ],
)
def test_what_lies_there_says_how_it_is_read(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    is_folder = name == "index.json"
    found = open_stream(tmp_path if is_folder else tmp_path / name)
    assert found is None if kind is None else type(found) is kind
    if kind in (TarShards, ParquetFiles):
        assert type(open_stream(tmp_path)) is kind
        with pytest.raises(DataError, match="pictures are given apart only for"):
            open_stream(tmp_path, tmp_path)


def test_a_folder_of_nothing_known_is_told(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.zip").write_bytes(b"")
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "in" / "out")]) == 2
    assert "OUT lies in SOURCE" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "holds nothing that can be prepared" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "gone"), str(tmp_path / "out")]) == 2
    assert "no data at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_tars_is_prepared_by_the_command(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number in range(3):
        members = {
            "1.jpg": JPG,
            "1.txt": b"a red <b>star</b>",
            "2.jpg": JPG,
            "2.txt": b"hot \xf0\x9f\x94\xa5",
        }
        write_tar(tmp_path / "in" / f"{number}.tar", members)
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--rules", "web", "--num-workers", "1"]
    assert main(["prepare", *words, "--tokenizer", str(NANO)]) == 0
    shown = capsys.readouterr()
    assert "3 rows of 6" in shown.out
    assert "mended by rule: strip_html 3" in shown.out
    assert "refused, see" in shown.out
    assert "3 of 3 shards, 3 rows, 3 refused" in shown.err
    assert "not checked" not in shown.out
    words[1] = str(tmp_path / "unchecked")
    assert main(["prepare", *words]) == 0
    told = "whether rows fit their tasks was not checked: give --tokenizer for that\n"
    assert capsys.readouterr().out.endswith(told)
    rows = Prepared(tmp_path / "out")
    assert [rows[i].fields["text"] for i in range(3)] == ["a red star"] * 3
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "few"), "--limit", "1"]) == 0
    assert len(Prepared(tmp_path / "few")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-workers", "0"], "--num-workers must be positive"),
        (["--limits.min-side", "9"], "--limits.* has no effect without rules"),
        (["--rules", "wbe"], "unknown cleaning rules: got wbe"),
        (["--tokenizer", "nowhere"], "nowhere"),
        (["--limit", "0"], "--limit must be positive"),
        (["--skip", "1"], "--skip needs rows that can be read in any order: got 1"),
        (["--limtis.min-side", "9"], "--limits.min-side"),
    ],
)
def test_wrong_words_are_told_in_one_line(tmp_path, capsys, words, message):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", {"1.jpg": JPG, "1.txt": b"a"})
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


def test_first_rows_of_a_stream(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", {"1.jpg": JPG, "1.txt": b"a"})
    assert [row.key for row in read(First(TarShards(tmp_path), 2))] == ["0.tar/1", "1.tar/1"]
