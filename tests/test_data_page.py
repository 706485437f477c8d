"""The commands of docs/data.md print what the page says that they print."""

import re
from pathlib import Path

import dashscope
import pytest

from qwenvl_jax.cli import data

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SHOWN = re.findall(
    r"^```console\n\$ qwenvl data ((?:lint|stats) [^\n]+)\n(.*?)^```", PAGE, re.M | re.S
)


@pytest.mark.parametrize(("words", "output"), SHOWN, ids=[words for words, _ in SHOWN])
def test_the_page_shows_real_output(words, output, tmp_path, monkeypatch, capsys):
    for file in (ROOT / "tests" / "data" / "conversations").iterdir():
        (tmp_path / file.name).symlink_to(file)
    vocabulary = Path(dashscope.__file__).parent / "resources"
    (tmp_path / "Qwen-VL-Chat").symlink_to(vocabulary)
    monkeypatch.chdir(tmp_path)
    data.main(words.split())
    assert capsys.readouterr().out.rstrip() == output.rstrip()


def test_the_page_has_such_commands():
    assert len(SHOWN) >= 3
