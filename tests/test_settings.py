"""What a settings class refuses: a value of the wrong type or choice, wherever it was written."""

import dataclasses
import subprocess
import sys
import typing
from typing import Literal

import pytest

from qwenvl_jax import config as config_module
from qwenvl_jax.checks import ConfigError, Settings
from qwenvl_jax.cli.config_file import load_config, read_config
from qwenvl_jax.config import GuardConfig, LoraConfig, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part(Settings):
    side: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Settings):
    count: int = 1
    rate: float = 0.5
    is_on: bool = False
    name: str = ""
    kind: Literal["a", "b"] = "a"
    maybe: Literal["a", "b"] | None = None
    words: tuple[str, ...] = ()
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    part: Part = Part()
    parts: tuple[Part, ...] = ()


def test_values_of_the_right_type_are_taken():
    made = Whole(
        count=3, rate=1, kind="b", maybe="a", words=("x",), shares={"x": 2}, parts=(Part(),)
    )
    assert (made.rate, made.maybe, made.shares) == (1, "a", {"x": 2})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"count": "3"}, "Whole.count must be a whole number: got '3'"),
        ({"count": 3.0}, "Whole.count must be a whole number: got 3.0"),
        ({"count": True}, "Whole.count must be a whole number: got True"),
        ({"rate": None}, "Whole.rate must be a number: got None"),
        ({"rate": False}, "Whole.rate must be a number: got False"),
        ({"is_on": "no"}, "Whole.is_on must be True or False: got 'no'"),
        ({"name": 3}, "Whole.name must be text: got 3"),
        ({"kind": "c"}, "Whole.kind must be one of 'a', 'b': got 'c'"),
        ({"maybe": "c"}, "Whole.maybe must be one of 'a', 'b' or None: got 'c'"),
        ({"words": "x"}, "Whole.words must be a tuple, each item text: got 'x'"),
        ({"words": ("x", 1)}, "Whole.words must be a tuple, each item text"),
        (
            {"words": ("x", 1, 2)},
            "Whole.words must be a tuple, each item text: got 1 as words[1]",
        ),
        (
            {"parts": (Part(), 3)},
            "Whole.parts must be a tuple, each item a Part: got 3 as parts[1]",
        ),
        ({"shares": {"x": "1"}}, "Whole.shares must be a dict, each key text and each value a num"),
        ({"shares": None}, "Whole.shares must be a dict"),
        ({"part": {"side": 2}}, "Whole.part must be a Part: got {'side': 2}"),
        ({"parts": (None,)}, "Whole.parts must be a tuple, each item a Part"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(wrong, told):
    with pytest.raises(ConfigError) as refusal:
        Whole(**wrong)
    assert str(refusal.value).startswith(told)


IDLE = {
    "--model.lora.alpha=32": "LoraConfig.alpha has no effect: got 32.0 together with rank=0",
    "--model.vision.window-side=8": "VisionConfig.window_side has no effect: got 8 together",
    "--model.vision.global-every=2": "VisionConfig.global_every has no effect: got 2 together with",
    "--model.attention-block=256": "ModelConfig.attention_block has no effect: got 256 together",
    "--guard.rewind-margin=5": "GuardConfig.rewind_margin has no effect: got 5 together",
    "--guard.spike=off --guard.spike-sigmas=4": "GuardConfig.spike_sigmas has no effect: got 4.0",
}


@pytest.mark.parametrize("words", IDLE)
def test_a_setting_that_would_do_nothing_is_refused(words):
    with pytest.raises(ConfigError, match=f"{IDLE[words]}.* or leave it out, which is"):
        read_config("configs/nano/stage1.py", words.split())
    vision = VisionConfig(
        width=8, num_layers=1, num_heads=1, mlp_dim=8, patch_size=2, table_side=2,
        attention="window", window_side=8, global_every=2,
    )  # fmt: skip
    guard = GuardConfig(spike="rewind", spike_sigmas=4.0, rewind_margin=5)
    model = read_config(
        "configs/nano/stage1.py", ["--model.attention-backend=auto", "--model.attention-block=256"]
    ).model
    assert model.attention_block == 256
    lora = LoraConfig(rank=2, alpha=32.0, targets=("vit.*",), dropout=0.1)
    assert (vision.window_side, guard.rewind_margin, lora.alpha) == (8, 5, 32.0)


def test_every_class_of_settings_checks_its_fields():
    made = [kind for kind in vars(config_module).values() if dataclasses.is_dataclass(kind)]
    assert len(made) > 10
    assert all(issubclass(kind, Settings) for kind in made if isinstance(kind, type))


WRONG = {
    ("guard", "spike"): "rewnd",
    ("data", "mixing"): "weight",
    ("data", "mask"): "assistant",
    ("model", "remat"): "dot",
    ("model", "dtype"): "float16",
    ("model", "attention_backend"): "flash",
}
CONFIG = f"""
import dataclasses
from qwenvl_jax.cli.config_file import load_config

def get_config():
    base, told = load_config("configs/nano/stage2.py"), []
    for (part, field), value in {WRONG!r}.items():
        try:
            dataclasses.replace(getattr(base, part), **{{field: value}})
        except ValueError as error:
            told.append(str(error))
    raise ValueError("; ".join(told))
"""


def test_a_config_file_with_an_unknown_choice_is_refused(tmp_path):
    """In a process of its own: here annotations are checked everywhere, there by us alone."""
    file = tmp_path / "mine.py"
    file.write_text(CONFIG)
    command = [sys.executable, "train.py", str(file), f"--run-dir={tmp_path / 'run'}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    kinds = typing.get_type_hints(config_module.TrainConfig)
    assert run.returncode == 2
    for part, field in WRONG:
        assert f"{kinds[part].__name__}.{field} must be one of" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "run").exists()


def test_a_config_function_that_wants_arguments_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config(size):\n    return size\n")
    with pytest.raises(ConfigError, match=r"must need no arguments: .* 'size'"):
        load_config(file)


@pytest.mark.parametrize(
    "words",
    [
        ("--skip-steps", "1:2", "--skip-steps", "5:6"),
        ("--skip-steps=1:2", "--skip_steps=5:6"),
        ("--steps=3", "--steps=3"),
    ],
)
def test_an_option_that_comes_twice_is_refused(words):
    name = "--steps" if "--steps=3" in words else "--skip-steps"
    with pytest.raises(ConfigError, match=f"{name} is there twice: give it once"):
        read_config("configs/nano/stage1.py", words)
    assert read_config("configs/nano/stage1.py", ["--skip-steps", "1:2", "5:6"]).skip_steps == (
        "1:2",
        "5:6",
    )


def test_numbers_that_cannot_be_used_are_refused():
    with pytest.raises(ConfigError, match=r"below 2\*\*31: got 3000000000"):
        read_config("configs/nano/stage1.py", ["--steps=3000000000"])
    with pytest.raises(
        ConfigError, match=r"more than a row holds: got 100, expected at most \d+: each"
    ):
        read_config("configs/nano/stage1.py", ["--data.max-images=100"])
