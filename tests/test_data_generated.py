"""Generated sources as commands open them."""

import dataclasses
import pickle

import pytest

from qwenvl_jax.cli import data_prepare
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.sources.collages import Collages
from qwenvl_jax.data.sources.documents import Documents
from qwenvl_jax.data.sources.generated import GeneratedOptions, open_generated
from qwenvl_jax.data.sources.page_photo import PageSettings
from qwenvl_jax.data.sources.prepared import Prepared
from qwenvl_jax.data.sources.written_text import main as write_corpus


def test_options_reach_the_sources(tmp_path):
    (tmp_path / "a.txt").write_text("some plain words of a text " * 40)
    options = GeneratedOptions(split="heldout", tasks=("vqa",), side=96, languages=("zh",))
    made = open_generated("collages", 7, options)
    assert made == Collages(7, "heldout", side=96, tasks=("vqa",), languages=("zh",))
    page = PageSettings(short_side=(100, 100), max_lines=2)
    made = open_generated("documents", 5, GeneratedOptions(page=page, corpus=tmp_path))
    assert made == Documents(5, "train", page=page, corpus=tmp_path)
    made = open_generated("collages", 5, GeneratedOptions(most_kinds=2))
    assert made == Collages(5, "train", most_kinds=2)
    assert len(open_generated("collages", 3)) == 3


def test_what_has_no_effect_or_is_unknown_is_refused(tmp_path):
    with pytest.raises(DataError, match="got 'photos', expected collages, documents, scenes"):
        open_generated("photos", 1)
    with pytest.raises(DataError, match="corpus has no effect on collages"):
        open_generated("collages", 1, GeneratedOptions(corpus=tmp_path))
    with pytest.raises(DataError, match="side, emoji has no effect on documents"):
        open_generated("documents", 1, GeneratedOptions(side=64, emoji=True))


@pytest.mark.parametrize("name", ["collages", "documents"])
def test_a_worker_that_is_handed_a_source_makes_the_same_rows(name):
    page = PageSettings(short_side=(80, 90), max_lines=2)
    options = GeneratedOptions(page=page) if name == "documents" else GeneratedOptions(side=80)
    made = open_generated(name, 4, options)
    copy = pickle.loads(pickle.dumps(made))
    assert copy[2] == made[2]
    assert copy.fingerprint == made.fingerprint


def test_generated_rows_are_prepared_by_name(tmp_path, capsys):
    words = ["documents", str(tmp_path / "out"), "--limit", "3", "--num-workers", "1"]
    small = ["--generated.tasks", "ocr_vqa", "--generated.languages", "en"]
    assert data_prepare.main([*words, *small]) == 0
    prepared = Prepared(tmp_path / "out")
    made = open_generated("documents", 3, GeneratedOptions(tasks=("ocr_vqa",), languages=("en",)))
    assert [prepared[i] for i in range(3)] == [made[i] for i in range(3)]
    assert "ocr_vqa 3" in capsys.readouterr().out


def test_rows_after_those_of_another_folder_are_made(tmp_path):
    words = ["scenes", "--limit", "3", "--skip", "2", "--num-workers", "1"]
    assert data_prepare.main([*words, str(tmp_path / "more"), "--rows-per-shard", "2"]) == 0
    prepared, made = Prepared(tmp_path / "more"), open_generated("scenes", 5)
    assert [prepared[i] for i in range(3)] == [made[i] for i in (2, 3, 4)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["documents", "out"], "--limit is missing"),
        (["scenes", "out", "--limit", "3", "--skip", "-1"], "--skip must not be negative: got -1"),
        ([".", "../out", "--generated.emoji"], "--generated.* has no effect on ."),
    ],
)
def test_options_of_generated_rows_that_cannot_work_are_told(
    words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert data_prepare.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_picture_shows_no_more_kinds_than_asked():
    rows = Collages(60, "train", side=64, tasks=("grounded_caption",), most_kinds=1)
    named = [
        sum(bool(boxes) for _, boxes in row.fields["phrases"])
        for row in map(rows.__getitem__, range(60))
    ]
    assert set(named) == {1}
    more = Collages(60, "train", side=64, tasks=("grounded_caption",))
    assert more.fingerprint != rows.fingerprint
    assert max(len(more[i].fields["phrases"]) for i in range(60)) > 3
    with pytest.raises(DataError, match=r"1 to 6 kinds in a picture: got .* most_kinds 7"):
        Collages(1, "train", most_kinds=7)


def test_only_the_kinds_of_questions_asked_for_are_asked_where_they_can_be():
    options = GeneratedOptions(tasks=("vqa",), side=112, questions=("count", "where"))
    rows = open_generated("collages", 40, options)
    assert {rows[i].fields["kind"] for i in range(40)} == {"count", "where"}
    chosen = dataclasses.replace(options, questions=("relation",), side=None)
    times = []
    for asked in ((), ("relation",)):  # of one thing alone other things are asked
        scenes = open_generated("scenes", 80, dataclasses.replace(chosen, questions=asked))
        times.append([scenes[i].fields["kind"] for i in range(80)].count("relation"))
    assert times[1] > 2 * times[0] > 0, times
    for name in ("collages", "scenes"):
        usual = open_generated(name, 40, dataclasses.replace(options, questions=()))
        assert usual.fingerprint != open_generated(name, 40, chosen).fingerprint
        with pytest.raises(DataError, match=f"questions of {name} must be of .*, relation, .* got"):
            open_generated(name, 40, dataclasses.replace(options, questions=("why",)))


def test_a_corpus_is_written_without_senseless_signs(tmp_path):
    write_corpus([str(tmp_path / "corpus"), "--sentences", "300"])
    english, chinese = ((tmp_path / "corpus" / f"{name}.txt").read_text() for name in ("en", "zh"))
    assert len(english.splitlines()) == len(chinese.splitlines()) == 300
    assert english.isascii() or "“" in english
    assert len(set(chinese)) < 400  # of the 3755 signs that senseless text is drawn from
