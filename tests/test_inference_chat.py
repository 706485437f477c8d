"""Dialogues and completions: the prompts they make, what they return, and the history they keep."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from golden_model import model, write_folder
from PIL import Image

import qwenvl_jax
from qwenvl_jax.inference.errors import InputError
from qwenvl_jax.inference.session import Turn, _as_turn
from qwenvl_jax.inference.vl import VL

BOX_ANSWER = "<ref>a cat</ref><box>(1,2),(30,40)</box><box>(5,5),(9,9)</box>"


@pytest.fixture
def scripted(monkeypatch):
    """The golden model, whose answers are scripted; what it was asked is in `.asked`."""
    golden, asked, script = model(), [], []

    def stream(vl, tokens, images, **options):
        asked.append({"ids": list(tokens), "images": list(images), **options})
        for text in script.pop(0) if script else ["ok"]:
            yield golden.tokenizer.encode_raw(text)

    monkeypatch.setattr(VL, "stream", stream)
    monkeypatch.setattr(golden, "asked", asked, raising=False)
    monkeypatch.setattr(golden, "script", script, raising=False)
    return golden


def picture(shade: int, side: int = 40) -> np.ndarray:
    return np.full((side, side + 5, 3), shade, np.uint8)


def said(vl, ids) -> str:
    return vl.tokenizer.decode(ids)


def test_a_first_turn_is_the_released_prompt(scripted):
    reply = scripted.chat("What?", images=[picture(9)])
    [asked] = scripted.asked
    expected = scripted.tokenizer.chat_ids([("Picture 1: <img>x</img>\nWhat?", None)], raw=True)
    assert asked["ids"] == expected
    assert [image.shape for image in asked["images"]] == [(224, 224, 3)]
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (1.0, 0.3, 0)
    assert asked["max_new_tokens"] == 512
    tok = scripted.tokenizer
    assert set(asked["stop_tokens"]) == {tok.im_end_id, tok.im_start_id, tok.endoftext_id}
    assert (reply.text, reply.boxes, reply.is_complete) == ("ok", [], True)
    assert reply.tokens == tok.encode("ok")


def test_pictures_are_numbered_and_kept_through_the_dialogue(scripted):
    first = scripted.chat("One?", images=[picture(1), picture(2)])
    second = scripted.chat("Two?", images=[picture(3)], history=first.history)
    text = said(scripted, scripted.asked[1]["ids"])
    marks = [text.index(f"Picture {k}: <img>") for k in (1, 2, 3)]
    assert marks == sorted(marks)
    assert marks[1] < text.index("One?") < text.index("ok") < marks[2] < text.index("Two?")
    assert [int(image[0, 0, 0]) for image in scripted.asked[1]["images"]] == [1, 2, 3]
    assert len(first.history) == 1  # not changed by the second call
    assert [turn.text for turn in second.history] == ["One?", "Two?"]
    assert [len(turn.images) for turn in second.history] == [2, 1]


def test_one_picture_needs_no_list(scripted, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(7)).save(path)
    for one in (str(path), path, path.read_bytes(), Image.open(path), picture(7)):
        [turn] = scripted.chat("What?", images=one).history
        assert [int(image[0, 0, 0]) for image in turn.images] == [7]
    [turn] = scripted.chat("What?", images=np.stack([picture(7), picture(8)])).history
    assert [int(image[0, 0, 0]) for image in turn.images] == [7, 8]
    assert scripted.complete("What?", images=path).text == "ok"


def test_boxes_come_out_and_go_back_in_as_tags(scripted):
    scripted.script.append([BOX_ANSWER[:20], BOX_ANSWER[20:]])
    reply = scripted.chat("Find the cat.", images=[picture(1)])
    assert reply.text == BOX_ANSWER
    assert reply.boxes == [
        {"ref": "a cat", "box": (1, 2, 30, 40)},
        {"ref": "a cat", "box": (5, 5, 9, 9)},
    ]
    scripted.chat("And?", history=reply.history)
    ids = scripted.asked[1]["ids"]
    assert ids.count(scripted.tokenizer.box_start_id) == 2


def test_user_text_is_never_special_unless_places_are_made_live(scripted):
    tok = scripted.tokenizer
    text = "<|im_end|><img>x</img><|endoftext|><box>(1,1),(2,2)</box>"
    plain = scripted.chat(text)
    live = scripted.chat(text, live_tags=True)
    for asked in scripted.asked:
        assert tok.image_start_id not in asked["ids"]
        assert tok.endoftext_id not in asked["ids"]
        assert asked["ids"].count(tok.im_end_id) == 2  # system and user
    assert [asked["ids"].count(tok.box_start_id) for asked in scripted.asked] == [0, 1]
    scripted.chat("Next", history=live.history)
    scripted.chat("Next", history=plain.history)
    again = [asked["ids"].count(tok.box_start_id) for asked in scripted.asked[2:]]
    assert again == [1, 0]  # a turn stays what it was


@pytest.mark.parametrize(
    "turn", [["a", [], "c", []], ("a", "c", "d"), "ab", ("a", None), {"question": "a"}]
)
def test_a_turn_that_is_no_turn_is_refused(turn):
    # Past the type checks of tests, as callers are without them.
    with pytest.raises(InputError, match=r"turn 2 of the history is .*expected a Turn, or a pair"):
        _as_turn(turn, 2)


def test_plain_pairs_serve_as_history(scripted):
    scripted.chat("B?", history=[("A?", "a")])
    expected = scripted.tokenizer.chat_ids([("A?", "a"), ("B?", None)])
    assert scripted.asked[0]["ids"] == expected


def test_turns_that_do_not_fit_are_dropped_with_their_pictures(scripted):
    history = [Turn("old " * 30, (picture(1),), "a"), Turn("new", (picture(2),), "b")]
    reply = scripted.chat("Now?", history=history, max_window=150)
    assert reply.dropped_turns == 1
    assert [int(image[0, 0, 0]) for image in scripted.asked[0]["images"]] == [2]
    assert len(reply.history) == 3  # the caller's to keep; the window may be larger next time


def test_pictures_of_a_history_are_shown_at_the_size_of_this_model(scripted):
    larger = np.repeat(np.repeat(picture(3), 2, axis=0), 2, axis=1)
    scripted.chat("Now?", [picture(4)], history=[Turn("old", (larger,), "a")])
    shown = scripted.asked[0]["images"]
    side = scripted.config.image_size
    assert [image.shape for image in shown] == [(side, side, 3)] * 2
    assert [int(image[0, 0, 0]) for image in shown] == [3, 4]


def test_a_message_beyond_the_context_names_the_numbers(scripted):
    with pytest.raises(ValueError, match=r"too long: .* takes \d+ ids, 7680 are left"):
        scripted.chat("x" * 8000)


def test_a_stream_gives_text_as_it_comes_and_the_reply_at_the_end(scripted):
    scripted.script.append(["one ", "two", " three"])
    stream = scripted.chat_stream("Count.")
    assert list(stream) == ["one ", "two", " three"]
    assert stream.reply.text == "one two three"
    assert stream.reply.history[-1] == Turn("Count.", (), "one two three")
    cut = scripted.chat("Count.", max_new_tokens=2)
    assert not cut.is_complete  # the script's two tokens are all that was allowed


def test_a_stream_that_is_left_or_read_twice_gives_its_whole_answer(scripted):
    scripted.script += [["one ", "two", " three"]] * 3
    left = scripted.chat_stream("Count.")
    assert next(iter(left)) == "one "
    whole = scripted.chat("Count.")
    assert left.reply == whole
    assert whole.text == "one two three"
    taken_up = scripted.chat_stream("Count.")
    for piece in taken_up:
        assert piece == "one "
        break
    assert list(taken_up) == ["two", " three"]
    assert list(taken_up) == []
    assert taken_up.reply == whole


def test_an_interrupted_stream_has_no_reply(scripted, monkeypatch):
    def stream(vl, tokens, images, **options):
        yield vl.tokenizer.encode_raw("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(VL, "stream", stream)
    answer = scripted.chat_stream("Count.")
    with pytest.raises(KeyboardInterrupt):
        list(answer)
    with pytest.raises(RuntimeError, match="not whole: its stream was interrupted"):
        _ = answer.reply


def test_completion_has_pictures_then_text_and_no_roles(scripted):
    tok = scripted.tokenizer
    scripted.script.append(["<box>(3,4),(5,6)</box>"])
    reply = scripted.complete("<ref>the cup</ref>", [picture(1)], live_tags=True)
    [asked] = scripted.asked
    text = [tok.ref_start_id, *tok.encode("the cup"), tok.ref_end_id]
    assert asked["ids"] == tok.image_ids() + text
    assert asked["stop_tokens"] == (tok.endoftext_id,)
    assert asked["temperature"] == 0
    assert reply.boxes == [{"ref": "the cup", "box": (3, 4, 5, 6)}]
    assert reply.history == ()


def test_raw_completion_takes_every_tag(scripted):
    scripted.complete("a<img></img>b<|im_end|>", [picture(1)], raw=True)
    tok = scripted.tokenizer
    expected = [*tok.encode("a"), *tok.image_ids(), *tok.encode("b"), tok.im_end_id]
    assert scripted.asked[0]["ids"] == expected
    with pytest.raises(InputError, match="the prompt is empty"):
        scripted.complete("")


def test_unknown_options_and_unreadable_pictures_are_refused(scripted):
    with pytest.raises(TypeError, match=r"temprature.* did you mean 'temperature'"):
        scripted.chat("x", temprature=1)
    with pytest.raises(TypeError, match=r"'max_tokens', expected max_new_tokens, temperature, "):
        scripted.complete("x", max_tokens=4)
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        scripted.chat("x", images=["nowhere.png"])
    with pytest.raises(ValueError, match="fetching is off"):
        scripted.chat("x", images=["https://example.com/a.png"])


def test_a_folder_without_vocabulary_serves_ids_and_says_so_for_text(tmp_path):
    write_folder(tmp_path)
    vl = qwenvl_jax.from_pretrained(tmp_path, dtype="float32")
    assert vl.config.dtype == vl.config.param_dtype == "float32"
    assert vl.generate([5, 6], max_new_tokens=0) == []
    with pytest.raises(ValueError, match=r"qwen\.tiktoken"):
        vl.chat("Hello")


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    write_folder(tmp_path, with_tokenizer=True)
    file = tmp_path / "qwen.tiktoken"
    file.write_text("\n".join(file.read_text().splitlines()[:-1]))
    vl = qwenvl_jax.from_pretrained(tmp_path, dtype="float32")
    with pytest.raises(ValueError, match="does not belong to this model"):
        vl.chat("Hello")


def test_a_real_picture_is_encoded_once_in_a_dialogue(monkeypatch, tmp_path):
    vl, calls = model(), []
    encode = vl._forward.encode
    monkeypatch.setattr(
        vl._features, "_encode", lambda images: calls.append(len(images)) or encode(images)
    )
    Image.fromarray(picture(77)).save(tmp_path / "a.png")
    first = vl.chat("Hi", images=[tmp_path / "a.png"], max_new_tokens=6)
    assert 0 < len(first.tokens) <= 6
    same = vl.chat("Hi", images=[str(tmp_path / "a.png")], max_new_tokens=6)
    assert same.tokens == first.tokens  # the seed decides
    history = [first.history[0]._replace(answer="ok")]
    second = vl.chat("Go", images=[picture(78)], history=history, max_new_tokens=0)
    assert calls == [1, 1]  # the second turn encodes its own picture only
    assert len(second.history) == 2

    tok = vl.tokenizer
    greedy = vl.chat("Hi", images=[picture(77)], temperature=0.0, max_new_tokens=6)
    prompt = tok.chat_ids([("Picture 1: <img>x</img>\nHi", None)], raw=True)
    stop = (tok.im_end_id, tok.im_start_id, tok.endoftext_id)
    squares = np.stack(greedy.history[0].images)
    assert greedy.tokens == vl.generate(prompt, squares, stop_tokens=stop, max_new_tokens=6)


def test_one_model_serves_several_threads():
    vl = model()

    def ask(number: int) -> list[int]:
        return vl.chat("Hi", picture(number % 3), seed=number, max_new_tokens=5).tokens

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == [ask(number) for number in range(8)]


def test_the_package_offers_its_public_names():
    for name in qwenvl_jax.__all__:
        assert getattr(qwenvl_jax, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = qwenvl_jax.nonsense


WRONG_CALLS = """
import numpy as np
import qwenvl_jax
vl = qwenvl_jax.from_pretrained()
for call in (
    lambda: vl.chat("hi", max_new_tokens=7.5),
    lambda: vl.chat("hi", max_new_tokens="8"),
    lambda: vl.chat("hi", top_k=2.5),
    lambda: vl.chat("hi", seed=1.5),
    lambda: vl.chat("hi", temperature=None),
    lambda: vl.chat("hi", temperature=1e39),
    lambda: vl.chat("hi", system=None),
    lambda: vl.chat(5),
    lambda: vl.complete(None),
    lambda: vl.generate([5], stop_tokens=[5.5]),
    lambda: vl.generate([5], max_new_tokens=2.5),
    lambda: vl.generate_batch([[5]], seed=1.5),
    lambda: next(vl.stream([5], every=1.5)),
):
    try:
        print(call())
    except ValueError as error:
        print(f"{type(error).__name__}: {error}")
numbers = {"seed": np.int32(5), "temperature": np.float32(1)}
print(len(vl.generate([5], max_new_tokens=np.int64(3), **numbers)))
"""


def test_wrong_kinds_of_values_are_refused_by_name():
    """In a process of its own: here annotations are checked everywhere, there by us alone."""
    command = [sys.executable, "-c", WRONG_CALLS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    told = run.stdout.splitlines()
    expected = [
        "ChatOptions.max_new_tokens must be a whole number or None: got 7.5",
        "ChatOptions.max_new_tokens must be a whole number or None: got '8'",
        "ChatOptions.top_k must be a whole number: got 2.5",
        "ChatOptions.seed must be a whole number: got 1.5",
        "ChatOptions.temperature must be a number: got None",
        "temperature must be 0 or more, and below 1e38: got 1e+39",
        "ChatOptions.system must be text: got None",
        "the text must be a str: got 5",
        "the text must be a str: got None",
        "stop_tokens must be a whole number: got 5.5",
        "max_new_tokens must be a whole number: got 2.5",
        "seed must be a whole number: got 1.5",
        "every must be a whole number: got 1.5",
    ]
    assert told[:-1] == [f"InputError: {line}" for line in expected], run.stderr
    assert 0 <= int(told[-1]) <= 3
