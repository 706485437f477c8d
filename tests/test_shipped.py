"""The model that comes with the package: it is there, small, and sees."""

import json
from pathlib import Path

import pytest
from PIL import Image

import qwenvl_jax
from qwenvl_jax.cli import demo, infer
from qwenvl_jax.cli.config_file import read_config
from qwenvl_jax.cli.opening import SHIPPED_MODEL, AnswerOptions, open_model
from qwenvl_jax.data.pipeline import check_config
from qwenvl_jax.evaluation.scenes import examination, sit, summarise

MOST_BYTES = 16_000_000
CONFIGS = Path(__file__).parents[1] / "configs" / "nano"


@pytest.fixture(scope="module")
def shipped():
    return open_model(AnswerOptions())


def test_the_folder_is_whole_and_small():
    names = {path.name for path in SHIPPED_MODEL.iterdir()}
    assert {"config.json", "qwen.tiktoken", "model.safetensors"} <= names
    assert sum(path.stat().st_size for path in SHIPPED_MODEL.iterdir()) < MOST_BYTES


def test_it_is_what_opens_without_a_path():
    vl = qwenvl_jax.from_pretrained()
    assert vl.folder == SHIPPED_MODEL
    assert vl.config.dtype == "float32"
    assert vl.tokenizer.decode(vl.tokenizer.encode("a cat")) == "a cat"


@pytest.mark.parametrize("name", ["finetune", "finetune_lora"])
def test_configs_that_go_on_from_it_have_its_sizes(name, shipped):
    config = read_config(f"{CONFIGS}/{name}.py", ["--data.path=my.json"])
    assert (config.init, config.data.tokenizer) == (str(SHIPPED_MODEL), str(SHIPPED_MODEL))
    for part in ("vision", "adapter", "decoder", "image_start_id"):
        assert getattr(config.model, part) == getattr(shipped.config, part)
    check_config(config.data, slots=config.model.adapter.num_queries)


def test_it_answers_better_than_a_guess(shipped):
    """Floors well under the published scores, which `qwenvl eval` prints, and well over chance."""
    papers = examination(shipped.tokenizer, shipped.config.image_size, num_scenes=60, seed=3)
    scores = {score.measure: score.value for score in summarise(papers, sit(shipped, papers))}
    print(json.dumps(scores, indent=1))
    assert scores["question: all"] > 0.65
    assert scores["locate: IoU at 0.5"] > 0.55
    assert scores["question: colour"] > 0.6  # one of eight
    assert scores["caption: objects named"] > 0.75  # one of 64


def test_the_demo_writes_its_sheet_and_says_what_was_right(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--scenes", "3", "--output", "sheet.png"]) == 0
    said = capsys.readouterr().out
    assert said.count("(right)") + said.count("(wrong)") == 11
    assert said.count("(right)") >= 1
    assert Image.open("sheet.png").width > 900
    assert sorted(path.name for path in (tmp_path / "build" / "demo").iterdir()) == [
        *("collage_1_1.png", "collage_1_2.png", "collage_2_1.png"),
        *(f"scene_{number}.png" for number in (1, 2, 3)),
    ]


def test_infer_without_a_model_takes_the_shipped_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 60), (215, 35, 40)).save("red.png")
    assert infer.main(["--image", "red.png", "--temperature", "0", "Describe the picture."]) == 0
    assert capsys.readouterr().out.strip()
