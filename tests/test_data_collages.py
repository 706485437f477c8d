"""Collages: boxes against the pixels, phrases and answers against the picture, held-out objects."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qwenvl_jax
from qwenvl_jax.data import tasks
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import decode_record, encode_record
from qwenvl_jax.data.sources import (
    collage_chat,
    collage_chinese,
    collage_english,
    collage_facts,
    composition,
    cutouts,
    emoji_objects,
    nouns,
)
from qwenvl_jax.data.sources.collage_cells import cell_list, cell_things
from qwenvl_jax.data.sources.collages import TASKS, Collages
from qwenvl_jax.data.sources.composition import (
    MAX_HIDDEN,
    MIN_SIDE,
    Collage,
    Group,
    Thing,
    choose_groups,
    compose,
)
from qwenvl_jax.data.sources.nouns import Name, Noun
from qwenvl_jax.data.sources.scenes import COLOURS
from qwenvl_jax.prompt.tokenizer import load_tokenizer

NANO = Path(qwenvl_jax.__file__).parent / "assets" / "nano"
SIDE = 160
POOL = cutouts.drawn_kinds()


def collages(count):
    for key in range(count):
        rng = random.Random(key)
        yield compose(choose_groups(POOL, rng), SIDE, rng), rng


def kind(name):
    return next(k for k in POOL if k.name.english == name)


# --- pictures -----------------------------------------------------------------------------------


def test_a_box_is_tight_around_the_pixels_of_its_colour(monkeypatch):
    gray = (128, 128, 128)
    monkeypatch.setattr(
        composition, "background", lambda _, size, *__: Image.new("RGB", size, gray)
    )
    groups = [
        Group(kind("red star"), 1),
        Group(kind("blue heart"), 1),
        Group(kind("white ring"), 1),
    ]
    checked = 0
    for key in range(20):
        shown = compose(groups, SIDE, random.Random(key))
        pixels_YXC = np.asarray(shown.image, np.int16)
        for thing in shown.things:
            far = np.array(COLOURS[thing.name.colour]) - gray
            cover_YX = (pixels_YXC - gray) @ far / (far @ far)
            rest_YX = np.abs(pixels_YXC - gray - cover_YX[..., None] * far).max(2)
            near_YX = (cover_YX >= 0.5) & (rest_YX < 25)
            ys, xs = np.nonzero(near_YX)
            seen = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert np.abs(np.subtract(seen, thing.box)).max() <= 1, (key, thing)
            checked += 1
    assert checked > 40


def test_what_is_seen_of_a_thing_is_large_and_mostly_there():
    hidden = 0
    for shown, _ in collages(60):
        for thing in shown.things:
            x1, y1, x2, y2 = thing.box
            assert 0 <= x1 < x2 <= SIDE
            assert 0 <= y1 < y2 <= SIDE
            assert min(x2 - x1, y2 - y1) >= MIN_SIDE * SIDE
            assert thing.hidden <= MAX_HIDDEN
            hidden += thing.hidden > 0
    assert hidden > 3, "some things lie behind others"


# --- phrases and answers ------------------------------------------------------------------------


def meant_by(reference, shown):
    """Every thing that a careless reader could take the phrase for."""
    same = [thing for thing in shown.things if collage_facts.fits(thing, reference.name)]
    if reference.how == "name":
        return same
    if reference.how == "beside":
        anchors = [t for t in shown.things if t.name == reference.anchor]
        assert len(anchors) == 1
        return [t for t in same if collage_facts.may_lie(t, anchors[0], reference.link)]
    way = reference.how.removeprefix("most ")
    if way in ("bigger", "smaller"):
        ordered = sorted(same, key=lambda t: t.reach)
        return [ordered[-1 if way == "bigger" else 0]]
    ordered = sorted(same, key=lambda t: t.centre[0 if way in ("left", "right") else 1])
    return [ordered[0 if way in ("left", "above") else -1]]


def test_every_phrase_fits_one_thing_only():
    ways = set()
    for shown, _ in collages(100):
        for thing in shown.things:
            for reference in collage_facts.references(shown, thing):
                assert meant_by(reference, shown) == [thing], reference
                ways.add(reference.how)
    assert {"name", "beside", "left", "above", "most right", "bigger"} <= ways


def truth(asked, shown):
    count = {
        name: len([t for t in shown.things if collage_facts.fits(t, name)])
        for name in (asked.name, asked.other)
        if name
    }
    things = [reference.thing for reference in asked.references]
    match asked.kind:
        case "count":
            return count[asked.name]
        case "total":
            return len(shown.things)
        case "colour":
            return things[0].name
        case "exists":
            return count[asked.name] > 0
        case "relation":
            return collage_facts.may_lie(things[0], things[1], asked.link)
        case "more":
            return count[asked.name] > count[asked.other]
        case "neighbour":
            (found,) = (
                t
                for t in shown.things
                if t is not things[0] and collage_facts.may_lie(t, things[0], asked.link)
            )
            return found.name
    x, y = (int(3 * place / SIDE) - 1 for place in things[0].centre)
    return x, y


def test_every_answer_is_true_and_yes_is_as_frequent_as_no():
    kinds, said = set(), []
    for shown, rng in collages(200):
        asked = collage_facts.ask(shown, POOL, rng)
        assert asked.answer == truth(asked, shown), asked
        kinds.add(asked.kind)
        if isinstance(asked.answer, bool):
            said.append(asked.answer)
    assert kinds == {"count", "total", "colour", "exists", "relation", "neighbour", "where", "more"}
    assert 0.35 < np.mean(said) < 0.65


def test_two_pictures_are_compared_truly():
    one = compose(
        [Group(kind("red star"), 2), Group(kind("blue heart"), 1)], SIDE, random.Random(1)
    )
    two = compose(
        [Group(kind("red star"), 1), Group(kind("white ring"), 1)], SIDE, random.Random(2)
    )
    assert (len(one.things), len(two.things)) == (3, 2), "no object was left out"
    turns = {}
    for seed in range(60):
        turns |= dict(collage_chat.comparison(one, two, "en", random.Random(seed)))
    assert turns["What is in Picture 1 but not in Picture 2?"] == "a blue heart"
    assert turns["What is in Picture 2 but not in Picture 1?"] == "a white ring"
    assert turns["What is in both pictures?"] == "red stars"
    assert turns["Which picture has more red stars?"] == "Picture 1"
    assert turns["Which picture has more white rings?"] == "Picture 2"
    assert turns["Is there a blue heart in both pictures?"] == "no"
    assert turns["Find all the red stars in Picture 1."].startswith("<ref>the red stars</ref><box>")
    same = dict(collage_chat.comparison(one, one, "zh", random.Random(8)))
    assert set(same.values()) <= {"一样多", "没有", "是"} or "<box>" in str(same)


def test_turns_about_either_picture_are_true():
    one = compose(
        [Group(kind("red star"), 2), Group(kind("blue heart"), 1)], SIDE, random.Random(1)
    )
    two = compose([Group(kind("red star"), 1)], SIDE, random.Random(2))
    turns = {}
    for seed in range(60):
        turns |= dict(collage_chat.either(one, two, "en", random.Random(seed)))
    assert turns["How many red stars are in Picture 2?"] == "1"
    assert turns["How many red stars are in each picture?"] == "2 and 1"
    assert turns["How many blue hearts are in each picture?"] == "1 and 0"
    assert turns["Is there a blue heart in Picture 1?"] == "yes"
    assert turns["Is there a blue heart in Picture 2?"] == "no"
    assert turns["What is in Picture 2?"] == "a red star"
    chinese = dict(collage_chat.either(two, two, "zh", random.Random(3)))
    assert set(chinese.values()) == {"一个红色的星形", "1和1"}


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("en", "zh", "named"),
    [
        ("A red apple.", "一只红苹果。", ("red", "apple", "apples", "an", "苹果", "个")),
        ("A mouse.", "老鼠。", (None, "mouse", "mice", "a", "老鼠", "只")),
        (
            "An Indian elephant.",
            "象",
            (None, "Indian elephant", "Indian elephants", "an", "象", "头"),
        ),
        ("A unicorn!", None, (None, "unicorn", "unicorns", "a", None, "只")),
        ("A red kite.", "风筝", (None, "red kite", "red kites", "a", "风筝", "只")),
        ("Sad!", "哀伤！", None),
        ("A frog on a log.", "青蛙", None),
        ("A spider dancing.", None, None),
        ("A pair of glasses.", "一副眼镜", None),
        ("The letter A.", None, None),
        ("A mine.", "一个地雷。", None),
        ("A large spoon.", "勺子", None),
        ("", None, None),
    ],
)
def test_a_caption_names_a_countable_thing_or_nothing(en, zh, named):
    name = nouns.name_from_captions(en, zh, "animals")
    if named is None:
        assert name is None
    else:
        assert name is not None
        noun = name.noun
        assert (name.colour, noun.en, noun.plural, noun.article, noun.zh, noun.measure) == named


def test_articles_plurals_and_measure_words():
    apple = Name(Noun("apple", "apples", "an", "苹果", "个"))
    red = apple._replace(colour="red")
    english, chinese = collage_english.counted, collage_chinese.counted
    assert [english(apple, 1), english(red, 1), english(red, 2)] == [
        "an apple",
        "a red apple",
        "two red apples",
    ]
    assert english(apple._replace(colour="orange"), 1) == "an orange apple"
    assert [chinese(apple, 1), chinese(red, 2)] == ["一个苹果", "两个红色的苹果"]
    assert [nouns.measure_word(zh, "animals") for zh in ("山羊", "热带鱼", "斑马")] == [
        "只",
        "条",
        "匹",
    ]


# --- rows ---------------------------------------------------------------------------------------


def test_rows_are_pure_and_splits_differ():
    source = Collages(50, "train", side=SIDE)
    again = Collages(50, "train", side=SIDE)
    assert [source[i] for i in (0, 7, 49)] == [again[i] for i in (0, 7, 49)]
    assert source.fingerprint == again.fingerprint
    others = (Collages(51, "train", side=SIDE), Collages(50, "heldout", side=SIDE))
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 3
    assert len(source) == 50
    assert source[3] != others[1][3]
    with pytest.raises(IndexError, match="50 of 50"):
        source[50]


def test_without_english_there_are_no_rows_whose_prompts_are_english():
    source = Collages(60, "train", side=SIDE, languages=("zh",))
    rows = [source[i] for i in range(60)]
    assert {row.fields["language"] for row in rows} == {"zh"}
    assert {row.task for row in rows} == {"caption", "vqa", "ref_grounding", "chat"}
    assert (
        source.fingerprint != Collages(60, "train", side=SIDE, languages=("zh", "en")).fingerprint
    )
    with pytest.raises(DataError, match=r"grounded_caption are written in English only: got"):
        Collages(1, "train", side=SIDE, languages=("zh",), tasks=("vqa", "grounded_caption"))


def test_emoji_of_another_font_are_other_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(cutouts, "emoji_kinds", lambda font: [])
    fonts = [tmp_path / "a.ttf", tmp_path / "b.ttf"]
    for size, font in enumerate(fonts):
        font.write_bytes(bytes(size))
    one, two = (Collages(1, "train", side=SIDE, emoji_font=font).fingerprint for font in fonts)
    assert one != two


def test_rows_of_every_task_become_samples_with_live_places():
    tokenizer = load_tokenizer(NANO, slots=4)
    box_id = tokenizer.encode_raw("<box>")[0]
    source = Collages(120, "heldout", side=SIDE)
    seen = set()
    for index in range(120):
        row = decode_record(encode_record(source[index]), "row")
        assert row == source[index]
        sample = tasks.example_of(row, tokenizer)
        assert len(sample.images) == len(row.images)
        assert list(sample.ids).count(box_id) == str(dict(row.fields)).count("<box>") + (
            len(row.fields.get("boxes", ()))
            + ("box" in row.fields)
            + sum(len(boxes) for _, boxes in row.fields.get("phrases", ()))
        )
        with Image.open(io.BytesIO(row.images[0])) as picture:
            assert picture.size == (SIDE, SIDE)
        seen.add((row.task, len(row.images), row.fields["language"]))
    assert {task for task, *_ in seen} == set(TASKS) - {"compare"}
    assert ("chat", 2, "zh") in seen
    assert ("grounded_caption", 1, "zh") not in seen, "its prompt is English"


def test_training_never_names_what_is_held_out_and_half_of_the_held_out_rows_do():
    held = [k for k in POOL if k.is_held_out]
    assert 0 < len(held) < len(POOL) / 4
    names = [w(k.name) for k in held for w in (collage_english.singular, collage_chinese.singular)]
    names += [collage_english.plural(k.name) for k in held]
    train = Collages(200, "train", side=64)
    said = [str(train[i].fields) for i in range(200)]
    assert [text for text in said if any(name in text for name in names)] == []
    heldout = Collages(40, "heldout", side=64)
    marks = [heldout[i].fields["objects"] for i in range(40)]
    assert marks == ["seen", "unseen"] * 20
    located = [heldout[i] for i in range(40) if heldout[i].task == "grounded_captioning"]
    for row in located:
        is_named = any(name in row.fields["text"] for name in names)
        assert is_named == (row.fields["objects"] == "unseen")


# --- material -----------------------------------------------------------------------------------


def stamp(folder, name, caption, alpha=(0, 255)):
    picture = Image.new("RGBA", (60, 40), (200, 30, 30, alpha[0]))
    picture.paste((200, 30, 30, alpha[1]), (10, 5, 50, 35))
    picture.save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


def test_a_folder_of_cut_outs_gives_its_objects(tmp_path):
    animals = tmp_path / "animals"
    animals.mkdir()
    stamp(animals, "dog1", "A dog.\nde.utf8=Ein Hund.\nzh_CN.utf8=狗。\nzh_TW.utf8=犬\n")
    stamp(animals, "dog2", "A dog.\n")
    stamp(animals, "whole", "A cat.\nzh_CN.utf8=猫\n", alpha=(255, 255))
    stamp(animals, "odd", "Woof!\n")
    stamp(tmp_path, "broken", "A bird.\n")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (dog,) = cutouts.folder_kinds(tmp_path)
    assert (dog.noun.en, dog.noun.zh, dog.noun.measure, len(dog.pictures)) == ("dog", "狗", "只", 2)
    assert dog.picture(random.Random(0), 80).size == (80, 60)
    source = Collages(20, "heldout", side=SIDE, folder=tmp_path)
    assert dog in source.kinds
    assert source.fingerprint != Collages(20, "heldout", side=SIDE).fingerprint


def test_missing_material_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"does not exist.*tuxpaint-stamps-default"):
        Collages(1, "train", folder=tmp_path / "none")
    with pytest.raises(DataError, match="nothing in the folder"):
        Collages(1, "train", folder=tmp_path)
    with pytest.raises(DataError, match="holds no picture"):
        Collages(1, "train", photos=tmp_path)
    monkeypatch.setattr(emoji_objects, "font_files", tuple)
    with pytest.raises(DataError, match=r"no colour emoji font.*fonts-noto-color-emoji"):
        Collages(1, "train", emoji=True)
    with pytest.raises(DataError, match="tasks of collages must be of caption"):
        Collages(1, "train", tasks=("ocr",))


def test_photos_lie_behind_things(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    source = Collages(6, "train", side=SIDE, photos=tmp_path)
    assert source[0].images != Collages(6, "train", side=SIDE)[0].images
    assert source[0] == Collages(6, "train", side=SIDE, photos=tmp_path)[0]


def test_emoji_are_countable_nouns_in_both_languages():
    names = [name for _, name in emoji_objects.emoji_names()]
    assert len(names) > 200
    assert len({name.english for name in names}) == len(names)
    for name in names:
        assert name.noun.zh, name
        assert name.noun.plural != name.noun.en or name.noun.en.split()[-1] in (
            "fish",
            "sheep",
            "deer",
            "pufferfish",
        ), name


def has_emoji_font():
    try:
        return emoji_objects.find_emoji_font() is not None
    except DataError:
        return False


@pytest.mark.skipif(not has_emoji_font(), reason="apt-get install fonts-noto-color-emoji")
def test_emoji_are_drawn_in_colour():
    kinds = cutouts.emoji_kinds()
    assert len(kinds) > 200
    dog = next(k for k in kinds if k.noun.en == "dog").picture(random.Random(0), 100)
    assert max(dog.size) == 100
    colours = np.asarray(dog)[np.asarray(dog)[..., 3] > 200][:, :3]
    assert np.ptp(colours.astype(int), axis=1).max() > 40, "not a gray outline"


# --- what lies in each cell -----------------------------------------------------------------------


def test_a_cell_belongs_to_the_thing_that_covers_most_of_it():
    star, heart = (
        next(k for k in cutouts.drawn_kinds() if k.noun.en == n) for n in ("star", "heart")
    )
    things = (Thing(star, (0, 0, 30, 20), 0.0), Thing(heart, (10, 0, 40, 10), 0.0))
    collage = Collage(Image.new("RGB", (80, 80)), things)  # cells of 20 pixels
    found = [None if thing is None else thing.name.noun.en for thing in cell_things(collage)]
    # of the second cell each box covers half, so the first of them stays
    assert found == ["star", "star"] + [None] * 14
    assert cell_list(collage) == "star star" + " no" * 14
    heart_only = Collage(Image.new("RGB", (80, 80)), things[1:])
    assert cell_list(heart_only).split() == ["heart", "heart", *["no"] * 14]


def test_lists_of_cells_are_made_where_they_are_asked_for_only():
    rows = Collages(30, "train", side=64, tasks=("cells",))
    for row in map(rows.__getitem__, range(30)):
        assert (row.task, row.fields["kind"], row.fields["language"]) == ("vqa", "cells", "en")
        assert len(row.fields["answer"].split()) == 16
    assert "cells" not in Collages(1, "train").tasks
