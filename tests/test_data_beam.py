"""Preparation on Beam's DirectRunner; Beam needs an environment of its own, so this is a slow test.

python -m pip install '.[beam,test]' && python -m pytest -m slow tests/test_data_beam.py
"""

import pytest
from prepared_rows import Pairs, plan

from qwenvl_jax.cli.data import main
from qwenvl_jax.data.prepare import Progress, prepare, processes
from qwenvl_jax.data.sources.prepared import Prepared


def test_without_beam_the_command_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    (tmp_path / "a.txt").write_text("hello")
    assert main(["prepare", str(tmp_path), str(tmp_path / "out"), "--beam"]) == 2
    assert "--beam needs Apache Beam, which is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_beam_writes_the_same_bytes_and_goes_on_where_it_was(tmp_path):
    pytest.importorskip("apache_beam", reason="Beam's pins do not go with ours")
    from qwenvl_jax.data.beam import on_beam

    one, two = tmp_path / "one", tmp_path / "two"
    prepare(plan(one, Pairs()), processes(1))
    seen: list[Progress] = []
    engine = on_beam(["--runner=DirectRunner", "--direct_num_workers=2"])
    prepare(plan(two, Pairs()), engine, seen.append)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in two.iterdir()
    }
    assert seen[-1] == Progress(4, 4, 38, 2)
    assert len(Prepared(two)) == 38


@pytest.mark.slow
def test_the_command_runs_on_beam(tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="Beam's pins do not go with ours")
    (tmp_path / "a.txt").write_text("hello\n\nworld")
    words = [str(tmp_path / "a.txt"), str(tmp_path / "out"), "--beam", "--runner=DirectRunner"]
    assert main(["prepare", *words]) == 0
    assert "2 rows of 2" in capsys.readouterr().out
