"""Weights under another vocabulary: tokens keep their rows, new ones begin as they were spelled."""

import base64
import dataclasses

import jax
import numpy as np
import pytest
import tiny

from qwenvl_jax.checkpoint.weights import (
    WeightsError,
    open_weights,
    read_weights_config,
    save_weights,
)
from qwenvl_jax.cli.convert import main
from qwenvl_jax.conversion.vocabulary import EMBEDDING, HEAD, change_vocabulary, moved_rows
from qwenvl_jax.data.vocabulary import BYTES, train_bpe, write_tiktoken
from qwenvl_jax.model.qwenvl import abstract_state, draw_state
from qwenvl_jax.prompt.respelling import respelled, spellings
from qwenvl_jax.prompt.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer
from qwenvl_jax.sharding import make_mesh

OLD = [*BYTES, b"ca", b"cat"]
NEW = [*BYTES, b"ca", b"cat", b"cats", "猫".encode()]


def tokenizer(entries):
    return Tokenizer({entry: rank for rank, entry in enumerate(entries)}, slots=4)


def change(folder, target, source="weights"):
    new, spelled = respelled(folder / "new.tiktoken", tokenizer(OLD))
    return change_vocabulary(
        folder / source,
        target,
        spelled,
        image_start_id=new.image_start_id,
        vocabulary=folder / "new.tiktoken",
    )


def read(folder, name):
    leaf = open_weights(folder)[name]
    return leaf.read((slice(None),) * len(leaf.shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A weights folder with the old vocabulary, and one spare row that no id uses."""
    top = tmp_path_factory.mktemp("vocabulary")
    write_tiktoken(OLD, top / "old.tiktoken")
    old = tokenizer(OLD)
    config = tiny.model_config()
    decoder = dataclasses.replace(config.decoder, vocab_size=old.vocab_size + 1)
    config = dataclasses.replace(config, decoder=decoder, image_start_id=old.image_start_id)
    state = draw_state(config, jax.random.key(3), abstract_state(config, make_mesh())[1])
    save_weights(top / "weights", config, state, top / "old.tiktoken")
    write_tiktoken(NEW, top / "new.tiktoken")
    return top


def test_rows_follow_their_tokens(folder):
    old, new = tokenizer(OLD), tokenizer(NEW)
    change(folder, folder / "changed")
    for name, axis in ((EMBEDDING, 0), (HEAD, 1)):
        before = np.moveaxis(read(folder / "weights", name), axis, 0)
        after = np.moveaxis(read(folder / "changed", name), axis, 0)
        assert len(before) == old.vocab_size + 1
        assert len(after) == new.vocab_size
        np.testing.assert_array_equal(after[: len(OLD)], before[: len(OLD)])
        for token in SPECIAL_TOKENS:
            moved, stood = new.special_ids[token], old.special_ids[token]
            np.testing.assert_array_equal(after[moved], before[stood])
        cats, spelled = NEW.index(b"cats"), [OLD.index(b"cat"), OLD.index(b"s")]
        np.testing.assert_allclose(after[cats], before[spelled].mean(0), rtol=1e-6)
    config = read_weights_config(folder / "changed")
    assert config.decoder.vocab_size == new.vocab_size
    assert load_tokenizer(folder / "changed", 4, config.image_start_id).fingerprint == (
        new.fingerprint
    )


def test_everything_else_stays(folder, capsys):
    words = [str(folder / "weights"), str(folder / "new.tiktoken"), str(folder / "by_command")]
    assert main(["vocabulary", *words]) == 0
    assert f"{tokenizer(NEW).vocab_size} rows, ready" in capsys.readouterr().out
    for name in open_weights(folder / "weights").keys() - {EMBEDDING, HEAD}:
        before, after = read(folder / "weights", name), read(folder / "by_command", name)
        assert before.tobytes() == after.tobytes(), name


def test_a_sign_is_spelled_by_its_bytes():
    found = spellings(NEW, tokenizer(OLD))
    assert found[NEW.index("猫".encode())] == tuple("猫".encode())
    assert found[NEW.index(b"ca")] == (OLD.index(b"ca"),)
    assert found[len(NEW) :] == [(i,) for i in tokenizer(OLD).special_ids.values()]


def test_means_of_small_floats_are_taken_in_float32():
    table = np.array([[1.0], [2.0**-11]], np.float16)
    rows = moved_rows(table, [(0, 1), (1,)])
    assert rows.dtype == np.float16
    assert rows[0, 0] == np.float16(0.5 + 2.0**-12)
    assert rows[1, 0] == table[1, 0]


def test_what_cannot_be_done_is_said(folder, tmp_path, capsys):
    with pytest.raises(WeightsError, match="no weights folder of ours"):
        change(folder, tmp_path / "out", source="none")
    with pytest.raises(WeightsError, match="is there already"):
        change(folder, folder / "weights")
    (tmp_path / "cut.tiktoken").write_text(base64.b64encode(b"a").decode() + " 1\n")
    for file, told in (("cut.tiktoken", "not a whole vocabulary"), ("none", "no vocabulary at")):
        words = [str(folder / "weights"), str(tmp_path / file), str(tmp_path / "out")]
        assert main(["vocabulary", *words]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ranks_that_are_added_leave_those_before_as_they_are():
    known = train_bpe(["low low lower"], 3)
    grown = train_bpe(["slow slower low", "slow"], 9, known)
    assert grown[: len(known)] == known
    assert b"slow" in grown
    assert len(set(grown)) == len(grown)
