"""`infer.py` and `qwenvl chat`: what they print and write, and one clear line for wrong input."""

import io
import shutil
import struct
import tempfile
import zlib

import numpy as np
import pytest
from golden_model import model
from PIL import Image

from qwenvl_jax.cli import chat, infer, opening, outputs
from qwenvl_jax.inference import session
from qwenvl_jax.inference.vl import VL

BOXES = "<ref>a cup</ref><box>(100,100),(500,900)</box>"


@pytest.fixture
def folder(monkeypatch):
    """A folder with a model, which is loaded once for all tests that mean no other."""

    def open_model(options):
        is_usual = options.model == model().folder and options.tensor == 1
        return model() if is_usual else opening.open_model(options)

    monkeypatch.setattr(infer, "open_model", open_model)
    monkeypatch.setattr(chat, "open_model", open_model)
    return model().folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with one picture."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save("cup.png")
    return tmp_path


@pytest.fixture
def answers(monkeypatch):
    """Scripts the model: each prompt gets the next answer, and is written down."""
    script, asked = [], []

    def stream(vl, tokens, images, **options):
        asked.append({"text": vl.tokenizer.decode(tokens), "ids": list(tokens), **options})
        yield vl.tokenizer.encode_raw(script.pop(0))

    monkeypatch.setattr(VL, "stream", stream)
    return script, asked


def test_an_answer_is_printed_and_its_boxes_are_drawn(folder, here, answers, capsys):
    script, asked = answers
    script.append(f" {BOXES}")
    arguments = ["--model", str(folder), "--image", "cup.png", "Find the <ref>cup</ref>."]
    assert infer.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == BOXES + "\n"
    assert "answer.png" in err
    before, after = np.array(Image.open("cup.png")), np.array(Image.open("answer.png"))
    assert after.shape == before.shape
    assert (after != before).any()
    text = asked[0]["text"]
    assert text.endswith("user\nPicture 1: <img></img>\nFind the <ref>cup</ref>.<|im_end|>\n"
                         "<|im_start|>assistant\n")  # fmt: skip


def test_boxes_never_replace_a_file_that_nobody_named(folder, here, answers, monkeypatch, capsys):
    (here / "cup.png").rename("answer.png")
    (here / "answer-2.png").symlink_to("nowhere.png")  # what is there for others
    kept = (here / "answer.png").read_bytes()
    answers[0].extend([BOXES] * 5)
    arguments = ["--model", str(folder), "--image", "answer.png", "Where?"]
    assert infer.main(arguments) == 0
    assert "boxes: answer-3.png\n" in capsys.readouterr().err
    assert (here / "answer.png").read_bytes() == kept
    for told in (["answer-1.png", "answer-4.png"], ["answer-5.png", "answer-6.png"]):
        assert talk(monkeypatch, folder, "/image answer.png", "Where?", "And?") == 0
        err = capsys.readouterr().err
        assert [line for line in err.splitlines() if "boxes" in line] == [
            f"(boxes: {name})" for name in told
        ]
    assert (here / "answer.png").read_bytes() == kept


def test_a_picture_that_its_format_does_not_take_spoils_nothing(
    folder, here, answers, monkeypatch, capsys
):
    Image.new("RGB", (16400, 8), "white").save("wide.png")
    (here / "old.webp").write_bytes(b"old")
    answers[0].extend([BOXES, BOXES])
    arguments = ["--model", str(folder), "--image", "wide.png", "Where?", "--output"]
    assert infer.main([*arguments, "old.webp"]) == 2
    err = capsys.readouterr().err
    assert "infer: WEBP does not take the picture: got 16400 x 8 pixels for 'old.webp'" in err
    assert err.endswith("; use .png\n")
    assert (here / "old.webp").read_bytes() == b"old"
    assert sorted(path.name for path in here.iterdir()) == ["cup.png", "old.webp", "wide.png"]
    assert infer.main([*arguments, "new.png"]) == 0
    assert Image.open("new.png").size == (16400, 8)


@pytest.mark.parametrize("name", ["new.png", "new.jpg", "new.jpeg", "new.webp", "new.BMP"])
def test_a_picture_is_written_as_its_name_says(here, name):
    outputs.save_picture(Image.new("RGB", (8, 8)), here / name)
    kind = outputs.DRAWN_FORMATS[f".{name[4:].lower()}"]
    assert Image.open(here / name).format == kind


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    folder, here, answers, monkeypatch, capsys
):
    def refused(**_):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)
    arguments = ["--model", str(folder), "--image", "cup.png", "--output", "new.png", "Where?"]
    assert infer.main(arguments) == 2
    assert "the folder cannot be written to: got '.', Permission denied" in capsys.readouterr().err
    assert talk(monkeypatch, folder, "Hi", options=("--output-dir", str(here))) == 2
    assert "Permission denied; name another place" in capsys.readouterr().err
    assert answers[1] == []
    answers[0].append("hello")  # without boxes nothing is to be written
    assert talk(monkeypatch, folder, "Hi") == 0


def test_a_drawing_that_nobody_asked_for_may_fail(folder, here, answers, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "answer.png")

    monkeypatch.setattr(infer, "save_drawn", full)
    arguments = ["--model", str(folder), "--image", "cup.png", "Find the <ref>cup</ref>."]
    answers[0].extend([BOXES, BOXES])
    assert infer.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == BOXES + "\n"
    assert "boxes are not drawn: No space left on device: 'answer.png'; name a place" in err
    assert infer.main([*arguments, "--output", "cup-boxes.png"]) == 2


def test_an_answer_without_boxes_writes_nothing(folder, here, answers, capsys):
    answers[0].append("a cup")
    arguments = ["--model", str(folder), "--image", "cup.png", "--output", "new.png", "What?"]
    assert infer.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == "a cup\n"
    assert "no boxes" in err
    assert not (here / "new.png").exists()


def test_an_empty_answer_is_told(folder, here, answers, monkeypatch, capsys):
    answers[0].extend([" ", ""])
    assert infer.main(["--model", str(folder), "hi"]) == 0
    assert capsys.readouterr() == ("\n", "the answer is empty\n")
    assert talk(monkeypatch, folder, "hi") == 0
    assert "(the answer is empty)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        (["--task", "caption"], "<img></img>Generate the caption in English:"),
        (["--task", "ground"], "<img></img>Generate the caption in English with grounding:"),
        (["--task", "question", "What is it?"], "<img></img> What is it? Answer:"),
        (["--task", "locate", "the cup"], "<img></img><ref>the cup</ref>"),
        (["--task", "read"], "<img></img>OCR with grounding:"),
        (["--task", "complete", "It is"], "<img></img>It is"),
        (["--raw-prompt", "It<img></img>is<|im_end|>"], "It<img></img>is<|im_end|>"),
    ],
    ids=str,
)
def test_the_base_formats_are_those_of_training(folder, here, answers, arguments, prompt):
    script, asked = answers
    script.append("<box>(0,0),(9,9)</box>" if "locate" in arguments else "x")
    assert infer.main(["--model", str(folder), "--image", "cup.png", *arguments]) == 0
    assert asked[0]["text"] == prompt
    assert asked[0]["temperature"] == 0
    assert (here / "answer.png").exists() == ("locate" in arguments)


def test_options_reach_the_decoder(folder, here, answers):
    script, asked = answers
    script.append("x")
    arguments = ["--max-new-tokens", "7", "--temperature", "0.5", "--top-k", "3", "--seed", "4"]
    assert infer.main(["--model", str(folder), *arguments, "--top-p", "0.8", "hi"]) == 0
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
    assert [asked[0][name] for name in names] == [7, 0.5, 3, 0.8, 4]


def huge_png(side: int) -> bytes:
    """Returns a small file that claims, and holds, side x side gray pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packed = zlib.compress(bytes((side // 8 + 2) * side), 9)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png", "hi"], "nowhere.png"),
        (["--image", "text.png", "hi"], "text.png"),
        (["--image", "huge.png", "hi"], "13000"),
        (["x" * 9000], "too long"),
        (["--model", "nowhere", "hi"], "nowhere"),
        (["--model", "cut", "hi"], "model.safetensors"),
        ([], "prompt is missing"),
        (["--task", "read", "hi"], "takes no prompt"),
        (["--task", "locate", "--top-p", "0.5", "hi"], "--temperature above 0"),
        (["--temperature", "0", "--top-p", "0.5", "hi"], "--temperature above 0"),
        (["--seed", "-1", "hi"], "--seed must lie in 0 .. 2**63 - 1: got -1"),
        (["--raw-prompt", "--task", "read"], "--task"),
        (["--task", "locate", "hi"], "--task locate needs a picture: got none"),
        (["--task", "caption"], "--task caption needs a picture: got none"),
        (["--max-new-tokens", "0", "hi"], "--max-new-tokens must be positive: got 0"),
        (["--image", "https://example.com/a.png", "hi"], "--allow-fetch"),
        (["--output", "x.png", "hi"], "--image"),
        (["--image", "cup.png", "--output", "x.txt", "hi"], "must end in"),
        (["--image", "cup.png", "--output", "no/x.png", "hi"], "no folder"),
        (["--image", "cup.png", "--output", ".", "hi"], "the picture's place is a folder: got '.'"),
        (["--image", "cup.png", "--output", "cut", "hi"], "name a file in it, such as 'cut/ans"),
        (["--image", "cup.png", "--output", "text.png/a/x.png", "hi"], "'text.png' is a file"),
        (["--image", "cup.png", "--output", "./cup.png", "hi"], "--image reads as 'cup.png'"),
        (["caf\udce9?"], r"the prompt is not text in utf-8: got 'caf\udce9?'"),
        (["--tensor", "99", "hi"], "--tensor"),
        (
            ["--temperature", "-1", "hi"],
            "infer: --temperature must be 0 or more, and below 1e38: got -1",
        ),
        (
            ["--temperature", "1", "--top-p", "2", "hi"],
            "infer: --top-p must lie in (0, 1]: got 2.0",
        ),
        (["--max-new-tokens", "9000", "hi"], "got 9000"),
        (["--repetition-penalty", "0", "hi"], "infer: --repetition-penalty must be above 0"),
        (["--raw-prompt", "no picture", "--image", "cup.png"], "0 picture spans"),
        (["--raw-prompt", "<img>"], "<img> is not closed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_input_ends_in_one_line(folder, here, capsys, arguments, message):
    (here / "text.png").write_text("not a picture\n")
    (here / "huge.png").write_bytes(huge_png(13000))
    assert (here / "huge.png").stat().st_size < 30_000
    shutil.copytree(folder, here / "cut")
    weights = here / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    model = [] if "--model" in arguments else ["--model", str(folder)]
    assert infer.main([*model, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("infer: ")


def talk(monkeypatch, folder, *lines: str, options: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    return chat.main(["--model", str(folder), *options])


def test_a_piped_dialogue(folder, here, answers, monkeypatch, capsys):
    script, asked = answers
    script += ["a cup", BOXES, "again"]
    lines = ["/image cup.png", "What is it?", "Where?", "/history", "/clear", "New", "/quit", "no"]
    assert talk(monkeypatch, folder, *lines) == 0
    out, err = capsys.readouterr()
    assert "80 x 60" in out
    assert out.index("a cup") < out.index(BOXES) < out.index("> [1 picture] What is it?")
    assert "answer-1.png" in err
    assert (here / "answer-1.png").exists()
    texts = [a["text"] for a in asked]
    assert len(texts) == 3
    assert "What is it?" in texts[1]
    assert "Picture 1" in texts[1]
    assert "What is it?" not in texts[2]
    assert "Picture 1" not in texts[2]


def test_a_wrong_line_does_not_end_the_dialogue(folder, here, answers, monkeypatch, capsys):
    answers[0].append("hello")
    assert talk(monkeypatch, folder, "/image nowhere.png", "/help", "", "Hi") == 2
    out, err = capsys.readouterr()
    assert "chat: picture 'nowhere.png' does not exist" in err
    assert "commands:" in out
    assert "hello" in out


def test_options_are_checked_before_the_model_is_loaded(here, monkeypatch, capsys):
    monkeypatch.setattr("qwenvl_jax.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for words, told in (
        (["--temperature", "1", "--top-p", "2"], "--top-p must lie in (0, 1]: got 2.0"),
        (["--max-new-tokens", "2048"], "--max-new-tokens must be at most 2047, within the"),
    ):
        for command, rest in ((infer, ["hi"]), (chat, [])):
            assert command.main([*words, *rest]) == 2
            assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "0", "--top-k", "3"), "--temperature above 0"),
        (("--seed", "-1"), "--seed must lie in"),
        (("--top-k", "-2"), "chat: --top-k must be 0 (off) or more: got -2"),
        (("--system", "caf\udce9"), r"--system is not text in utf-8: got 'caf\udce9'"),
        (("--output-dir", "no"), "no folder to write to: got 'no'; make no first"),
        (("--output-dir", "cup.png"), "no folder to write to: 'cup.png' is a file"),
    ],
)
def test_a_dialogue_refuses_options_as_a_single_question_does(
    folder, here, monkeypatch, capsys, options, message
):
    assert talk(monkeypatch, folder, "Hi", options=options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("chat: ")
    assert message in err


def test_a_dialogue_ends_where_nobody_reads_on(folder, here, answers, monkeypatch, capsys):
    def gone(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(chat.Talk, "take", gone)
    monkeypatch.setattr(chat, "run_command", lambda _, run, argv: run(argv))
    with pytest.raises(BrokenPipeError):  # which `run_command` ends quietly
        talk(monkeypatch, folder, "Hi", "again")
    assert capsys.readouterr().err == ""


def test_a_mistyped_command_is_an_error_in_a_pipe(folder, here, answers, monkeypatch, capsys):
    answers[0].append("hello")
    assert talk(monkeypatch, folder, "/imge cup.png", "Hi") == 2
    out, err = capsys.readouterr()
    assert "chat: no such command: got '/imge', expected one of these commands: /image" in err
    assert "hello" in out
    assert talk(monkeypatch, folder, "/help") == 0


def test_a_line_that_is_no_text_is_named_and_the_next_is_answered(
    folder, here, answers, monkeypatch, capsys
):
    answers[0].append("hello")
    piped = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nHi\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", piped)
    assert chat.main(["--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert r"chat: line 1 is not text in utf-8: got 'caf\udce9?'" in err
    assert "hello" in out
    assert len(answers[1]) == 1


def test_pictures_of_a_message_that_is_too_long_do_not_wait(
    folder, here, answers, monkeypatch, capsys
):
    answers[0].append("hello")
    assert talk(monkeypatch, folder, "/image cup.png", "x" * 9000, "Hi") == 2
    out, err = capsys.readouterr()
    assert "too long" in err
    assert "(1 picture no longer waiting)" in err
    assert "hello" in out
    assert "Picture 1" not in answers[1][0]["text"]


def test_a_stopped_answer_leaves_the_dialogue_as_it_was(folder, here, answers, monkeypatch, capsys):
    class Stopped(session.TextStream):
        def __iter__(self):
            yield "half"
            raise KeyboardInterrupt

    answers[0].append("whole")
    kinds = [Stopped, session.TextStream]

    def make(*parts):
        return kinds.pop(0)(*parts)

    monkeypatch.setattr(session, "TextStream", make)
    noted = []
    monkeypatch.setattr(chat, "note_cut_work", lambda: noted.append("once"))
    assert talk(monkeypatch, folder, "/image cup.png", "One", "Two") == 0
    out, err = capsys.readouterr()
    assert "half" in out
    assert "whole" in out
    assert "(stopped)" in err
    assert noted == ["once"]
    assert "One" not in answers[1][-1]["text"]
    assert "Picture 1" in answers[1][-1]["text"]  # the picture still waited


def test_the_real_model_answers_through_the_door(folder, here, capsys):
    arguments = ["--model", str(folder), "--image", "cup.png", "--max-new-tokens", "3", "hi"]
    assert infer.main([*arguments, "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert err in ("", "cut after 3 tokens; --max-new-tokens allows more\n")
