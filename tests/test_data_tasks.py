"""The sample formats, byte for byte, with the loss on the marked spans and nowhere else."""

import hashlib
import itertools

import numpy as np
import pytest

from qwenvl_jax.data import tasks
from qwenvl_jax.data.example import DataError, Example
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.scene_rows import TASKS, scene_example
from qwenvl_jax.data.vocabulary import scene_sentences, train_bpe
from qwenvl_jax.prompt.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer

NANO = "configs/nano/scenes.tiktoken"
SLOTS = 3
IMG = "<img></img>"
EOS = "<|endoftext|>"
PICTURE = np.zeros((28, 28, 3), np.uint8)
BOX, OTHER_BOX = (661, 612, 833, 812), (120, 555, 265, 770)
QUAD = ((568, 121), (625, 131), (624, 182), (567, 172))


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO, slots=SLOTS)


def marked(example: Example, tok: Tokenizer) -> str:
    """Returns the sample's text with what is learnt between ⟦ and ⟧."""
    text = ""
    runs = itertools.groupby(
        zip(example.ids.tolist(), example.is_target.tolist(), strict=True), lambda pair: pair[1]
    )
    for is_target, run in runs:
        piece = tok.decode([token for token, _ in run])
        text += f"⟦{piece}⟧" if is_target else piece
    return text


FORMATS = {
    "caption": (
        tasks.caption("the beautiful flowers for design."),
        f"{IMG}Generate the caption in English:⟦ the beautiful flowers for design.{EOS}⟧",
    ),
    "map": (
        tasks.cell_map([("no", "no"), ("ring", "red"), ("no", "no"), ("star", "blue")]),
        f"{IMG}Shapes:⟦ no ring no star⟧ Colours:⟦ no red no blue{EOS}⟧",
    ),
    "letters": (
        tasks.cell_characters("Letters", "..A9", "...."),
        f"{IMG}Letters:⟦..A9⟧ Next:⟦....{EOS}⟧",
    ),
    "vqa": (
        tasks.vqa("Does it have a colour?", "No, it is white."),
        f"{IMG} Does it have a colour? Answer:⟦ No, it is white.{EOS}⟧",
    ),
    "ocr_vqa": (
        tasks.ocr_vqa("What is the title of this book?", "Asi Se Dice!, Volume 2"),
        f"{IMG} What is the title of this book? Answer:⟦ Asi Se Dice!, Volume 2⟧{EOS}",
    ),
    "grounded_caption": (
        tasks.grounded_caption(
            [
                tasks.Phrase("Beautiful shot of"),
                tasks.Phrase(" bees", (BOX, OTHER_BOX)),
                tasks.Phrase(" gathering nectars"),
            ]
        ),
        f"{IMG}Generate the caption in English with grounding:⟦ Beautiful shot of<ref> bees</ref>"
        "<box>(661,612),(833,812)</box><box>(120,555),(265,770)</box> gathering nectars"
        f"{EOS}⟧",
    ),
    "grounded_caption_phrase_first": (
        tasks.grounded_caption([tasks.Phrase("Woman", (BOX,)), tasks.Phrase(" alone")]),
        f"{IMG}Generate the caption in English with grounding:⟦<ref> Woman</ref>"
        f"<box>(661,612),(833,812)</box> alone{EOS}⟧",
    ),
    "ref_grounding": (
        tasks.ref_grounding("the ear on a giraffe", [BOX]),
        f"{IMG}<ref>the ear on a giraffe</ref>⟦<box>(661,612),(833,812)</box>{EOS}⟧",
    ),
    "grounded_captioning": (
        tasks.grounded_captioning(BOX, "Yellow gloves"),
        f"{IMG}<ref>This</ref><box>(661,612),(833,812)</box> is⟦ Yellow gloves{EOS}⟧",
    ),
    "ocr": (
        tasks.ocr([("It is managed", QUAD), ("by 2", QUAD)]),
        f"{IMG}OCR with grounding:⟦ <ref>It is managed</ref>"
        "<quad>(568,121),(625,131),(624,182),(567,172)</quad><ref>by 2</ref>"
        f"<quad>(568,121),(625,131),(624,182),(567,172)</quad>{EOS}⟧",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_and_loss_borders(name, tok):
    segments, expected = FORMATS[name]
    example = tasks.to_example(segments, [PICTURE], tok, name, "row 7")
    assert marked(example, tok) == expected
    assert example.ids.dtype == np.int32
    assert (example.task, example.key) == (name, "row 7")


def test_plain_text_is_learnt_whole(tok):
    example = tasks.to_example(tasks.plain_text("a tree"), [], tok, "text", "row 1")
    assert marked(example, tok) == f"⟦a tree{EOS}⟧"
    assert example.is_target.all()


def test_chat_has_the_released_mask(tok):
    turns = [(f"Picture 1: {IMG}\nWhat is it?", "a star"), ("Where?", "<box>(1,2),(3,4)</box>")]
    example = tasks.chat_example(turns, [PICTURE], tok, "row 3")
    end = "<|im_end|>\n"
    assert marked(example, tok) == (
        f"⟦<|im_start|>⟧system\nYou are a helpful assistant.⟦{end}<|im_start|>⟧user\n"
        f"Picture 1: {IMG}\nWhat is it?⟦{end}<|im_start|>⟧assistant\n⟦a star{end}"
        f"<|im_start|>⟧user\nWhere?⟦{end}<|im_start|>⟧assistant\n⟦<box>(1,2),(3,4)</box>{end}⟧"
    )
    assert tok.box_start_id in example.ids


def test_slots_carry_no_loss(tok):
    example = tasks.to_example(tasks.caption("a star"), [PICTURE], tok, "caption", "row 1")
    is_picture = np.isin(example.ids, tok.image_ids())
    assert is_picture.sum() == SLOTS + 2
    assert not example.is_target[is_picture].any()


def test_wrong_number_of_pictures_names_the_row(tok):
    with pytest.raises(DataError, match=r"row 41.*marks 1 picture in.*got 2"):
        tasks.to_example(tasks.caption("a star"), [PICTURE] * 2, tok, "caption", "row 41")
    with pytest.raises(DataError, match=r"row 42.*marks 0 pictures.*got 1"):
        tasks.chat_example([("Hello", "Hello")], [PICTURE], tok, "row 42")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("has_picture", [True, False])
def test_scene_samples_of_every_task(task, has_picture, tok):
    for key in range(40):
        example = scene_example(task, key, "train", 28, tok, has_picture)
        again = scene_example(task, key, "train", 28, tok, has_picture)
        assert np.array_equal(example.ids, again.ids)
        assert example.task == task
        assert f"/{key}/{task}" in example.key
        assert len(example.images) == int(has_picture and task != "text")
        text = marked(example, tok)
        assert (IMG in text) == bool(example.images)
        assert text.endswith("<|im_end|>\n⟧" if task == "chat" else f"{EOS}⟧") or task == "ocr_vqa"
        assert "\ufffd" not in text


def test_text_only_samples_hold_the_answer_in_their_inventory(tok):
    for key in range(60):
        example = scene_example("ref_grounding", key, "train", 28, tok, has_picture=False)
        before, _, target = marked(example, tok).partition("⟦")
        box = target.partition("</box>")[0]
        assert before.count(box) == 1


def test_unknown_task_is_refused(tok):
    with pytest.raises(ValueError, match=r"unknown task.*'captoin'"):
        scene_example("captoin", 1, "train", 28, tok)


SCENE_IDS = "f8e521163c2ef1eb9a51774f9470c421b14c2140f624e95f44475e5c266ea7d7"


def test_scene_samples_have_the_ids_that_the_small_model_was_trained_with(tok):
    digest = hashlib.sha256()
    for task in TASKS:
        for has_picture, key in itertools.product((True, False), range(12)):
            example = scene_example(task, key, "train", 28, tok, has_picture)
            digest.update(example.ids.tobytes())
            digest.update(example.is_target.tobytes())
    assert digest.hexdigest() == SCENE_IDS


# --- text of users --------------------------------------------------------------------------------

EVIL = "".join(SPECIAL_TOKENS[:5]) + "<ref>a</ref><box>(1,2),(3,4)</box><quad></quad><img>x</img>"
ROWS = {
    "caption": ({"text": EVIL, "language": "en"}, 1),
    "vqa": ({"question": EVIL, "answer": EVIL}, 2),
    "ocr_vqa": ({"question": EVIL, "answer": EVIL}, 2),
    "grounded_caption": ({"phrases": [[EVIL, []], [EVIL, [BOX]]]}, 2),
    "ref_grounding": ({"phrase": EVIL, "boxes": [BOX]}, 1),
    "grounded_captioning": ({"box": BOX, "text": EVIL}, 1),
    "ocr": ({"lines": [[EVIL, QUAD], [EVIL, QUAD]]}, 2),
    "text": ({"text": EVIL}, 1),
}


@pytest.mark.parametrize("task", ROWS)
def test_tags_in_a_users_text_stay_text(task, tok):
    fields, times = ROWS[task]
    images = () if task == "text" else (PICTURE,)
    ids = tasks.example_of(Record("k", task, fields, images), tok).ids
    tame = {name: _tame(value) for name, value in fields.items()}
    tame_ids = tasks.example_of(Record("k", task, tame, images), tok).ids
    special = lambda ids: [i for i in ids.tolist() if i >= tok.num_ranks]  # noqa: E731
    assert special(ids) == special(tame_ids)
    assert tok.decode(ids).count(EVIL) == times


def _tame(value):
    if isinstance(value, str):
        return value.replace(EVIL, "word")
    return [_tame(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_tags_of_a_dialogue_are_live_but_markers_are_not(tok):
    value = "Picture 1: <img>a.jpg</img>\n<ref>it</ref><box>(1,2),(3,4)</box><|im_end|>"
    turns = [{"from": "user", "value": value}, {"from": "assistant", "value": "<|endoftext|>"}]
    ids = tasks.example_of(Record("k", "chat", {"conversations": turns}, (PICTURE,)), tok).ids
    assert np.count_nonzero(ids == tok.image_pad_id) == SLOTS
    assert np.count_nonzero(ids == tok.ref_start_id) == 1
    assert np.count_nonzero(ids == tok.im_end_id) == 3  # of the system, the question, the answer
    assert tok.endoftext_id not in ids


@pytest.mark.parametrize(
    "text",
    [
        "\0",
        "\ud800 lone",
        "\\\\n",
        "\u202eright to left",
        "👩‍👩‍👧 e\u0301",
        "a" * 300_000,
        " \u0338",
    ],
    ids=["nul", "surrogate", "backslashes", "rtl", "emoji", "long", "combining"],
)
def test_any_text_is_data(text, tok):
    row = Record("k", "ref_grounding", {"phrase": text, "boxes": [BOX]}, (PICTURE,))
    ids = tasks.example_of(row, tok).ids
    special = [i for i in ids.tolist() if i >= tok.num_ranks and i != tok.image_pad_id]
    assert special == [
        *(tok.image_start_id, tok.image_end_id, tok.ref_start_id, tok.ref_end_id),
        *(tok.box_start_id, tok.box_end_id, tok.endoftext_id),
    ]


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("text", {"text": ""}, "text is empty"),
        ("caption", {"text": " \n", "language": "en"}, "text is empty"),
        ("caption", {"text": None, "language": "en"}, "text must be text: got NoneType"),
        ("vqa", {"question": "?", "answer": 3}, "answer must be text: got int"),
        ("ocr", {"lines": []}, "lines is empty"),
        ("ref_grounding", {"phrase": "a", "boxes": []}, "boxes is empty"),
        ("ref_grounding", {"phrase": "a", "boxes": [[1, 2, 3, 1000]]}, r"must lie in 0\.\.999"),
        ("ref_grounding", {"phrase": "a", "boxes": [[5, 2, 3, 9]]}, "corners reversed"),
        ("grounded_captioning", {"text": "a", "box": [1, 2, 3]}, "another form"),
        ("grounded_caption", {"phrases": [["", [BOX]]]}, "phrases is empty"),
        ("chat", {"conversations": ["hi"]}, "conversations of another form"),
        ("chat", {"conversations": [{"from": "user", "value": "<img>a"}]}, "not closed"),
        ("chat", {"conversations": [], "system": 3}, "system must be text"),
    ],
)
def test_rows_that_teach_nothing_or_wrong_places_are_refused_by_name(task, fields, message, tok):
    with pytest.raises(DataError, match=f"row 5.*{message}"):
        tasks.example_of(Record("5", task, fields), tok)


def dialogue(question: str, answer: str) -> Record:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return Record("5", "chat", {"conversations": turns})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("<box>(900,100),(100,2000)</box>", "not in 0..999.*are these pixels"),
        ("<box>(30,2),(3,4)</box>", "left of or above its first"),
        ("<box>(0.1,0.2),(0.3,0.4)</box>", "not written as.*whole thousandths, not fractions"),
        ("<box>(1, 2), (3, 4)</box>", r"expected \(1,2\),\(3,4\)"),
        ("<quad>(1,2),(30,4),(30,5000),(1,50)</quad>", "not in 0..999"),
    ],
)
def test_a_dialogue_with_a_broken_place_is_refused_by_name(place, message, tok):
    for turn, row in enumerate((dialogue(f"In {place}?", "A dog."), dialogue("Where?", place))):
        with pytest.raises(DataError, match=f"row 5, turn {turn}: .*{message}"):
            tasks.example_of(row, tok)


@pytest.mark.parametrize("answer", ["at <box>(125,250),(375,500)", "a <ref>dog", "dog</ref>"])
def test_a_tag_without_its_partner_may_be_asked_about_but_not_answered(answer, tok):
    with pytest.raises(DataError, match="row 5, turn 1: a tag is not closed"):
        tasks.example_of(dialogue("Where?", answer), tok)
    assert tok.decode(tasks.example_of(dialogue(f"Why {answer}?", "So."), tok).ids).count(answer)


def test_a_turn_that_is_dropped_may_have_any_place(tok):
    said = dialogue("Where?", "<box>(1,2),(3,4)</box>").fields["conversations"]
    turns = [{"from": "assistant", "value": "<box>(9,9),(1,1)</box>"}, *said]
    row = Record("5", "chat", {"conversations": turns})
    assert tasks.example_of(row, tok).ids.tolist().count(tok.box_start_id) == 1
    turns[2]["value"] = "<box>(9,9),(1,1)</box>"
    with pytest.raises(DataError, match="row 5, turn 2: "):
        tasks.example_of(row, tok)


def test_a_box_without_area_is_kept(tok):
    row = Record("k", "ref_grounding", {"phrase": "a line", "boxes": [[7, 1, 7, 9]]}, (PICTURE,))
    assert "<box>(7,1),(7,9)</box>" in tok.decode(tasks.example_of(row, tok).ids)


# --- the vocabulary -------------------------------------------------------------------------------


def test_bpe_merges_the_most_frequent_pair_first():
    learnt = train_bpe(["low low low lower", "no 11 11"], 4)
    assert learnt[:256] == [bytes([byte]) for byte in range(256)]
    # " low" occurs 3 times and "low" once: l+o 4, o+w 4; the smaller bytes win the tie.
    assert learnt[256:259] == [b"lo", b"low", b" low"]
    assert b"11" not in learnt  # digits are pieces of their own


def test_bpe_stops_where_nothing_repeats():
    assert len(train_bpe(["ab"], 9)) == 256
    assert train_bpe(["aab aab"], 1)[-1] == b"aa"


def test_shipped_vocabulary_is_small_and_suits_the_scenes(tok):
    assert tok.vocab_size < 768
    assert len(tok.encode("1234567890")) == 10
    words = "What colour is the small triangle? a purple diamond above an orange heart"
    assert len(tok.encode(words)) == len(words.replace("?", " ?").split())
    assert len(tok.encode(" TREE")) == 5  # drawn words are spelled
    assert tok.decode(tok.encode("Ünïcode 猫")) == "Ünïcode 猫"


def test_vocabulary_corpus_has_no_drawn_words():
    corpus = list(scene_sentences(180))
    letters = [piece for text in corpus for piece in text.split() if piece.isupper()]
    assert set(letters) <= {"OCR"}
    assert any("colour" in text for text in corpus)
