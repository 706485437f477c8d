"""Compiled programs kept on the disk: found again when the program is the same, and only then."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from qwenvl_jax.planning.cache import (
    CompiledProgram,
    ProgramCache,
    Sizes,
    TooLarge,
    program_digest,
)

pytestmark = pytest.mark.full_compiles

FITS = CompiledProgram(
    text="HloModule step",
    sizes=Sizes(arguments=7, results=5, shared=3, temporaries=11, code=2),
    too_large=None,
    seconds=1.5,
    host_bytes=13,
)
REFUSED = dataclasses.replace(
    FITS, text=None, sizes=None, too_large=TooLarge(needed=5, capacity=3, largest=("2G f32[7]",))
)


@pytest.mark.parametrize("program", [FITS, REFUSED], ids=["fits", "refused"])
def test_a_program_comes_back_as_it_was_kept(tmp_path, program):
    cache = ProgramCache(tmp_path / "new")
    assert cache.read("abc") is None
    cache.write("abc", program)
    assert cache.read("abc") == program
    assert cache.read("abd") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["abc.json.gz"]


def test_a_damaged_file_is_compiled_again(tmp_path):
    cache = ProgramCache(tmp_path)
    cache.write("abc", FITS)
    whole = (tmp_path / "abc.json.gz").read_bytes()
    for damaged in (b"", whole[:-9], b"{}", whole[:20] + b"\0\0\0\0" + whole[24:]):
        (tmp_path / "abc.json.gz").write_bytes(damaged)
        assert cache.read("abc") is None
    cache.write("abc", FITS)
    assert cache.read("abc") == FITS


def test_a_folder_that_cannot_be_written_costs_a_line_and_not_the_plan(tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "plans"):
        ProgramCache(folder).write("abc", FITS)
        said = capsys.readouterr().err
        assert f"the compiled program was not kept in {folder}: " in said
        assert said.endswith("; name another folder with --cache\n")
        assert ProgramCache(folder).read("abc") is None


def test_options_of_the_compiler_in_the_environment_are_part_of_the_digest(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a")
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    found = {program_digest("x")}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a")
    found.add(program_digest("x"))
    monkeypatch.delenv("XLA_FLAGS")
    found.add(program_digest("x"))
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    found.add(program_digest("x"))
    assert len(found) == 4
    assert program_digest("x") in found


def test_a_total_counts_results_that_are_new():
    assert FITS.sizes is not None
    assert FITS.sizes.total == 7 + 11 + (5 - 3) + 2
    assert dataclasses.replace(FITS.sizes, peak=17).total == 17 + 2, "what is alive at once"


def test_the_digest_follows_the_program_and_not_its_place_in_the_source():
    def add(x):
        return x + 1

    def add_too(x):
        return x + 1

    def lowered(function, size=3):
        return jax.jit(function).lower(jnp.zeros(size)).as_text(debug_info=True).replace("_too", "")

    here = program_digest(lowered(add), "v5e-8")
    assert lowered(add) != lowered(add_too), "their places differ"
    assert program_digest(lowered(add_too), "v5e-8") == here
    assert program_digest(lowered(add, 4), "v5e-8") != here
    assert program_digest(lowered(add), "v5e-16") != here
