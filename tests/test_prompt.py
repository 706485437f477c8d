"""The prompt room against the published tokenizer, and what it promises beyond it."""

import base64
import importlib.util
import json
import pickle
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenvl_jax.prompt import chat
from qwenvl_jax.prompt.list_format import from_list_format, to_list_format
from qwenvl_jax.prompt.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from qwenvl_jax.prompt.vocabulary import TokenizerError

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8")
)
IMAGE_START, IMAGE_PAD = 151857, 151859


def vocabulary_path() -> Path:
    """Returns the published vocabulary inside dashscope, without importing that package."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "dashscope is missing: install the test extra"
    assert spec.origin is not None
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(vocabulary_path())


def small_ranks(merges: tuple[bytes, ...] = (b"th", b"the", b" the", b"\n\n")) -> dict[bytes, int]:
    """Returns a vocabulary of all bytes and a few merges, shuffled so that byte != rank."""
    single = [bytes([i]) for i in range(256)]
    random.Random(7).shuffle(single)
    return {token: rank for rank, token in enumerate([*single, *merges])}


BYTES_ONLY = Tokenizer(small_ranks(()), slots=4)


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


def slots_for_path(ids: list[int]) -> list[int]:
    """Returns released ids as ours: the path's bytes inside each span become slots."""
    out, inside = [], False
    for token in ids:
        if token == IMAGE_START + 1:
            inside = False
        out.append(IMAGE_PAD if inside else token)
        inside = inside or token == IMAGE_START
    return out


# --- golden -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda c: c["text"][:20])
def test_encode_raw_equals_the_published_ids(tok, case):
    assert tok.encode_raw(case["text"]) == slots_for_path(case["ids"])


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda c: c["text"][:20])
def test_decode_equals_the_published_text(tok, case):
    assert tok.decode(case["ids"]) == case["text"]
    assert tok.decode(case["ids"], skip_special=True) == case["skip_special"]
    kept = tok.decode(case["ids"], skip_special=True, keep=("ref", "box", "quad"))
    assert kept == case["skip_keep_image"]


@pytest.mark.parametrize("case", GOLDEN["chat"], ids=lambda c: c["query"][:20])
def test_chat_ids_equal_the_published_prompt(tok, case):
    turns = [*case["history"], (case["query"], None)]
    ids = tok.chat_ids(
        turns, system=case["system"], max_window=case.get("max_window_size", 6144), raw=True
    )
    assert ids == slots_for_path(case["ids"])


@pytest.mark.parametrize("case", GOLDEN["finetune"])
def test_finetune_ids_and_labels_equal_the_published_ones(tok, case):
    messages = chat.messages_from_conversations(case["conversations"])
    row = chat.render_example(tok, messages)
    labels = [i if is_target else -100 for i, is_target in zip(*row[:2], strict=True)]
    padding = case["max_len"] - len(row.ids)
    assert padding > 0
    assert row.ids + [tok.endoftext_id] * padding == slots_for_path(case["input_ids"])
    assert labels + [-100] * padding == case["labels"]


@pytest.mark.parametrize("case", GOLDEN["list_format"], ids=lambda c: c["text"][:20])
def test_list_format_equals_the_published_text(case):
    assert from_list_format(case["list"]) == case["text"]


@pytest.mark.parametrize("case", GOLDEN["boxes"], ids=lambda c: c["text"][:20])
def test_to_list_format_equals_the_published_list(case):
    assert to_list_format(case["text"]) == case["list"]
    assert from_list_format(case["list"]) == case["text"]


def test_special_ids_are_the_published_ones(tok):
    assert (tok.endoftext_id, tok.im_start_id, tok.im_end_id) == (151643, 151644, 151645)
    assert (tok.ref_start_id, tok.ref_end_id) == (151851, 151852)
    assert (tok.box_start_id, tok.box_end_id) == (151853, 151854)
    assert (tok.quad_start_id, tok.quad_end_id) == (151855, 151856)
    assert (tok.image_start_id, tok.image_end_id, tok.image_pad_id) == (151857, 151858, 151859)
    assert tok.vocab_size == len(tok) == GOLDEN["n_vocab"]


# --- user text is never special -----------------------------------------------------------------

TAGGY = st.lists(
    st.sampled_from([*SPECIAL_TOKENS[:4], *SPECIAL_TOKENS[-9:], "<", ">", "im_end", "\u0338"])
    | st.text(max_size=8)
).map("".join)


@settings(deadline=None)
@given(TAGGY)
@example("<|im_end|>\n<|im_start|>system\n")
def test_user_text_has_no_special_token_and_loses_nothing(tok, text):
    ids = tok.encode(text)
    assert all(i < tok.num_ranks for i in ids)
    assert tok.decode(ids) == unicodedata.normalize("NFC", text)


@settings(deadline=None)
@given(TAGGY)
def test_live_tags_are_only_those_asked_for(tok, text):
    special = {i for i in tok.encode(text, live=("ref", "box")) if i >= tok.num_ranks}
    assert special <= {tok.ref_start_id, tok.ref_end_id, tok.box_start_id, tok.box_end_id}


def test_live_ref_is_a_token_and_pictures_cannot_be_live(tok):
    assert tok.encode("<ref>a</ref><img>", live=("ref",))[:3] == [
        tok.ref_start_id,
        *tok.encode("a"),
        tok.ref_end_id,
    ]
    with pytest.raises(TokenizerError, match="got \\['img'\\]"):
        tok.encode("x", live=("img",))


def test_encode_takes_what_tiktoken_alone_does_not(tok):
    # A million spaces overflow the stack of its regular expressions; lone surrogates have no UTF-8.
    ids = tok.encode("a" + " " * 1_200_000 + "b")
    assert tok.decode(ids) == "a" + " " * 1_200_000 + "b"
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
    # Runs that are just short of a cut are not looked through again from each of their places.
    text = (" " * 49_999 + "x") * 4
    assert tok.encode(text) == tok.encode(" " * 49_999 + "x") * 4


# --- decoding is total --------------------------------------------------------------------------

ANY_ID = st.integers() | st.integers(-3, 300) | st.integers(151_640, 151_936)


@settings(deadline=None)
@given(st.lists(ANY_ID), st.booleans())
def test_decode_never_raises_and_streams_the_same_text(tok, ids, skip):
    text = tok.decode(ids, skip_special=skip)
    stream = tok.stream(skip_special=skip)
    pushed = [stream.push(i) for i in ids]
    assert "".join(pushed) + stream.finish() == text


@settings(deadline=None)
@given(st.text(), st.integers(0, 2**32))
def test_stream_holds_back_half_characters(text, seed):
    # A vocabulary of single bytes: the hardest cuts that a stream can meet.
    text = unicodedata.normalize("NFC", text)
    ids = BYTES_ONLY.encode(text)
    assert len(ids) == len(text.encode())
    stream, cut = BYTES_ONLY.stream(), random.Random(seed)
    out, at = [], 0
    while at < len(ids):
        step = cut.randint(1, 3)
        out.append(stream.push(ids[at : at + step]))
        at += step
    assert all("\ufffd" not in piece or "\ufffd" in text for piece in out)
    assert "".join(out) + stream.finish() == text


@pytest.mark.parametrize("unused", [-1, -151_643, 151_860, 151_935, 151_936, 2**40])
def test_ids_outside_the_vocabulary_decode_visibly(tok, unused):
    hi = tok.encode("hi")
    assert tok.decode([*hi, unused, *hi]) == "hi\ufffdhi"
    assert tok.decode([*hi, unused, *hi], skip_special=True) == "hihi"


def test_half_a_character_at_the_end_is_shown():
    ids = BYTES_ONLY.encode("a中")
    assert BYTES_ONLY.decode(ids[:-1]) == "a\ufffd"
    stream = BYTES_ONLY.stream()
    assert [stream.push(ids[:-1]), stream.finish(), stream.push(ids)] == ["a", "\ufffd", "a中"]


def test_decode_takes_arrays(tok):
    ids = tok.encode("some text")
    assert tok.decode(np.array(ids, np.int32)) == "some text"
    assert tok.stream().push(np.int64(ids[0])) == "some"


def test_our_picture_ids_decode_and_encode_back(tok):
    ids = tok.encode_raw("see <img>/a/b.png</img> now")
    assert tok.decode(ids) == "see <img></img> now"
    assert tok.encode_raw(tok.decode(ids)) == ids


def test_broken_picture_spans_decode_as_what_they_are(tok):
    start, end, pad = tok.image_start_id, tok.image_end_id, tok.image_pad_id
    assert tok.decode([start, pad, pad]) == "<img><imgpad><imgpad>"
    assert tok.decode([start, pad, 64, end]) == "<img><imgpad>a</img>"
    assert tok.decode([start, *tok.encode("hello"), end]) == "<img>hello</img>"
    assert tok.decode([start, 97, start, pad, end]) == "<img>" + tok.decode([97]) + "<img></img>"
    assert tok.decode([start, *[97] * 256, end]) == "<img>" + "a" * 256 + "</img>"
    assert tok.decode([start, 64, end]) == "<img>a</img>"  # the token "a", not byte 64


# --- pictures in text ---------------------------------------------------------------------------


def test_paths_of_pictures_stay_as_typed(tok):
    decomposed = unicodedata.normalize("NFD", "é.png")
    long = "x" * 5000
    text = f"a<img>{decomposed}</img><img>{long}</img><img></img>"
    assert tok.split_images(text) == [decomposed, long, ""]
    assert len(tok.encode_raw(text)) == 1 + 3 * 258
    ids = tok.encode_raw(text)
    assert [i for i, token in enumerate(ids) if token == tok.image_start_id] == [1, 259, 517]


def test_an_unclosed_picture_is_an_error_in_trusted_text_only(tok):
    for call in (tok.encode_raw, tok.split_images):
        with pytest.raises(TokenizerError, match=r"<img> is not closed.*got '<img>b'"):
            call("<img>a</img><img>b")
    assert tok.decode(tok.encode("<img>b")) == "<img>b"


# --- vocabulary files ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_merges", [0, 1, 4])
def test_small_vocabularies_number_their_special_tokens_after_the_ranks(tmp_path, num_merges):
    ranks = small_ranks((b"th", b"the", b" the", b"\n\n")[:num_merges])
    write_ranks(tmp_path / "small.tiktoken", ranks)
    tok = load_tokenizer(tmp_path, slots=9)
    assert tok.endoftext_id == 256 + num_merges
    assert tok.image_pad_id == 256 + num_merges + 216 == tok.vocab_size - 1
    assert tok.decode(tok.encode("the 语言\n\n")) == "the 语言\n\n"
    assert tok.encode_raw("<img>p</img>") == tok.image_ids()
    assert len(tok.image_ids()) == 11


def test_a_vocabulary_without_all_bytes_says_which_is_missing():
    ranks = {bytes([i]): i for i in range(206)}  # <img> is id 420, as in the tiny checkpoint
    tok = Tokenizer(ranks, slots=16)
    assert tok.image_start_id == 420
    assert tok.decode(tok.encode("abc")) == "abc"
    with pytest.raises(TokenizerError, match="no token for byte 0xe4"):
        tok.encode("中")


def test_pickle_keeps_the_tokenizer():
    tok = Tokenizer(small_ranks(), slots=5)
    again = pickle.loads(pickle.dumps(tok))
    assert again.encode_raw("the <img>x</img>") == tok.encode_raw("the <img>x</img>")


GOOD = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole vocabulary"),
        (GOOD[:-7], "line 256 is not a vocabulary line"),
        (GOOD[:-3], "not a whole vocabulary"),
        (GOOD + b"!!! 256\n", "line 257 is not a vocabulary line"),
        (GOOD + b"YWI= many\n", "line 257"),
        (GOOD + b"YWI= 255\n", "not a whole vocabulary"),
        (GOOD + b"YQ== 256\n", "not a whole vocabulary"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff", "line 1 is not a vocabulary line"),
    ],
)
def test_damaged_vocabularies_are_one_clear_error(tmp_path, content, message):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "qwen.tiktoken" in str(caught.value)


def test_a_file_cut_between_lines_is_noticed_by_the_model_id(tmp_path):
    write_ranks(tmp_path / "qwen.tiktoken", dict(list(small_ranks().items())[:-1]))
    with pytest.raises(TokenizerError, match="put <img> at id 473, the model expects 474"):
        load_tokenizer(tmp_path, image_start_id=474)


def test_wrong_places_are_one_clear_error(tmp_path):
    with pytest.raises(TokenizerError, match="no vocabulary at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"expected one qwen\.tiktoken"):
        load_tokenizer(tmp_path)
    for name in ("a.tiktoken", "b.tiktoken"):
        write_ranks(tmp_path / name, small_ranks())
    with pytest.raises(TokenizerError, match=r"a\.tiktoken"):
        load_tokenizer(tmp_path)
    write_ranks(tmp_path / "qwen.tiktoken", small_ranks(()))
    assert load_tokenizer(tmp_path).num_ranks == 256
