"""`python convert.py import|export|adapter|...`: released folders to ours, and back."""

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qwenvl_jax.cli.errors import SUCCESS, USAGE_ERROR, interrupted_by, run_command
from qwenvl_jax.cli.options import told_in_one_line
from qwenvl_jax.cli.subcommands import choose
from qwenvl_jax.config import ConfigError
from qwenvl_jax.words import counted

_USAGE = """usage: python convert.py import SRC DST [--lora ADAPTER]
       python convert.py import --vit OPENCLIP --llm QWEN_7B DST [--num-queries N] [--seed N]
       python convert.py export SRC DST [--like RELEASED] [--shard-size 2GB] [--dtype keep]
       python convert.py vocabulary SRC TIKTOKEN DST
       python convert.py queries SRC NUMBER DST
       python convert.py adapter RUN DST

import writes our weights folder DST from SRC: a released Qwen-VL or Qwen-VL-Chat folder (.bin or
safetensors files, read without PyTorch and without running what is in them), or the directory of a
training run, whose newest checkpoint it takes. With --lora a PEFT adapter that was trained on the
released model is added to it. With --vit and --llm it joins the two models that stage 1 starts
from. export writes a folder that the released PyTorch code loads; with --like it gets that code and
its settings from a released folder, as `from_pretrained` wants them. vocabulary writes a weights
folder once more for another qwen.tiktoken file: tokens keep their rows, new ones start
as the mean of those that spelled them. queries writes it once more with another number of picture
embeddings, to be trained on: the adapter's grid is resized. adapter writes what a run with LoRA has
trained as a PEFT adapter, for the released model in PyTorch.

import and export keep one tensor and its copy in memory: 3 GB at full size; a run is held whole.
DST must be new; it appears when it is complete, and a conversion that fails leaves nothing behind.

example:
  python convert.py import Qwen-VL-Chat weights/chat
  python convert.py export weights/chat Qwen-VL-Chat-again --shard-size 5GB

exit codes: 0 done; 2 a wrong command or something wrong with SRC, all of it named; 130 interrupted
"""
LINES = 10  # of progress at most, where there is no terminal
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("convert", _run, argv)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return SUCCESS if argv else USAGE_ERROR
    commands = {
        "import": import_,
        "export": export,
        "vocabulary": vocabulary,
        "queries": queries,
        "adapter": adapter,
    }
    chosen = choose("convert.py", dict.fromkeys(commands, ""), argv, example="")
    if isinstance(chosen, int):
        return chosen
    name, words = chosen
    work = _parse(commands[name], words, f"convert.py {name}")
    # Nothing here computes: an accelerator would only be held, and its memory taken.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # A terminated conversion cleans up as an interrupted one does, and so does one whose terminal
    # is closed, unless nohup has it go on.
    with interrupted_by(signal.SIGTERM, signal.SIGHUP):
        work()
    return SUCCESS


def _parse(command: Callable[..., None], words: Sequence[str], prog: str) -> Callable[[], None]:
    """Returns the command with its arguments, to be called where its own messages are seen."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(command, *args, **kwargs)

    given = inspect.signature(command).parameters.values()
    options = [each.name for each in given if each.kind is not each.POSITIONAL_ONLY]
    names = [f"--{name.replace('_', '-')}" for name in options]
    with told_in_one_line(names):
        return tyro.cli(bind, args=list(words), prog=prog)


def _optional(metavar: str) -> Any:
    """Returns how `--help` shows what may be left out: what happens then is in its text."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def import_(
    folders: Annotated[tuple[Path, ...], _optional("[SRC] DST")],
    /,
    vit: Annotated[Path | None, _optional("FOLDER")] = None,
    llm: Annotated[Path | None, _optional("FOLDER")] = None,
    lora: Annotated[Path | None, _optional("FOLDER")] = None,
    num_queries: Annotated[int | None, _optional("INT")] = None,
    seed: Annotated[int | None, _optional("INT")] = None,
) -> None:
    """Writes our weights folder. Example: convert.py import Qwen-VL-Chat weights/chat

    Args:
        folders: the source and the new folder; with --vit and --llm the new folder alone
        vit: an OpenCLIP folder with its tower (ViT-bigG-14) and open_clip_config.json
        llm: a Qwen-7B folder
        lora: a PEFT adapter trained on SRC (adapter_config.json, adapter_model.*), to be added
        num_queries: picture embeddings of the new adapter, a square number; 256 if left out
        seed: of the new adapter's random weights; 0 if left out
    """
    from qwenvl_jax.conversion.load import is_run
    from qwenvl_jax.conversion.run import import_parts, import_released, import_run
    from qwenvl_jax.prompt.tokenizer import load_tokenizer

    if (vit is None) != (llm is None):
        raise ConfigError("--vit and --llm go together: got only one of them")
    wanted = 2 if vit is None else 1
    if len(folders) != wanted:
        raise ConfigError(
            f"import takes {'SRC and DST' if wanted == 2 else 'DST alone with --vit and --llm'}: "
            f"got {counted(len(folders), 'folder')}"
        )
    given = {"--num-queries": num_queries, "--seed": seed}
    idle = [name for name, value in given.items() if value is not None]
    if vit is None and idle:
        raise ConfigError(
            f"only the new adapter of --vit and --llm takes {' and '.join(idle)}: got SRC; leave "
            "it out (convert.py queries changes the number of embeddings)"
        )
    target = folders[-1]
    if lora is not None and (vit is not None or is_run(folders[0])):
        raise ConfigError(
            "--lora is added to a released folder: got parts or a run to import; make one of a run "
            "first (convert.py import RUN WEIGHTS, convert.py export WEIGHTS DIR)"
        )
    if vit is not None and llm is not None:
        config = import_parts(
            vit,
            llm,
            target,
            image_start_id=load_tokenizer(llm).image_start_id,
            num_queries=256 if num_queries is None else num_queries,
            seed=seed or 0,
            watch=watch,
        )
    elif is_run(folders[0]):
        config = import_run(folders[0], target)
    else:
        config = import_released(folders[0], target, watch, lora=lora)
    print(f"{target}: {config.vision.num_layers} + {config.decoder.num_layers} layers, ready")


def export(
    source: Annotated[Path, tyro.conf.arg(metavar="SRC")],
    target: Annotated[Path, tyro.conf.arg(metavar="DST")],
    /,
    shard_size: str = "2GB",
    dtype: Literal["keep", "bfloat16", "float32"] = "keep",
    like: Annotated[Path | None, _optional("RELEASED")] = None,
) -> None:
    """Writes a released folder. Example: convert.py export weights/mine Mine --like Qwen-VL-Chat

    Args:
        source: a weights folder of ours
        target: the new folder
        shard_size: of one safetensors file, as 500MB or 2GB
        dtype: of the tensors; keep gives back the bits that were imported
        like: a released folder whose code and settings are copied, for `from_pretrained`
    """
    from qwenvl_jax.conversion.run import export_released

    num_shards = export_released(
        source, target, shard_bytes=num_bytes(shard_size), dtype=dtype, like=like, watch=watch
    )
    print(f"{target}: {counted(num_shards, 'file')}, ready")


def vocabulary(
    source: Annotated[Path, tyro.conf.arg(metavar="SRC")],
    tiktoken: Annotated[Path, tyro.conf.arg(metavar="TIKTOKEN")],
    target: Annotated[Path, tyro.conf.arg(metavar="DST")],
    /,
) -> None:
    """Writes weights for another vocabulary. Example: convert.py vocabulary weights/a b.tiktoken b

    Args:
        source: a weights folder of ours
        tiktoken: the new vocabulary: a qwen.tiktoken file, or a folder that holds one
        target: the new folder
    """
    from qwenvl_jax.checkpoint.weights import check_ours, read_weights_config
    from qwenvl_jax.conversion.vocabulary import change_vocabulary
    from qwenvl_jax.prompt.respelling import respelled
    from qwenvl_jax.prompt.tokenizer import load_tokenizer
    from qwenvl_jax.prompt.vocabulary import find_vocabulary

    check_ours(source)
    before = read_weights_config(source)
    old = load_tokenizer(source, before.adapter.num_queries, before.image_start_id)
    new, spelled = respelled(tiktoken, old)
    config = change_vocabulary(
        source,
        target,
        spelled,
        image_start_id=new.image_start_id,
        vocabulary=find_vocabulary(tiktoken),
    )
    print(f"{target}: {config.decoder.vocab_size} rows, ready")


def adapter(
    run: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    target: Annotated[Path, tyro.conf.arg(metavar="DST")],
    /,
) -> None:
    """Writes a LoRA run's pairs for PEFT. Example: convert.py adapter runs/finetune_lora adapter

    Args:
        run: the directory of a training run with LoRA
        target: the new folder: adapter_config.json and adapter_model.safetensors
    """
    from qwenvl_jax.checkpoint.weights import is_weights_folder
    from qwenvl_jax.conversion.load import is_run
    from qwenvl_jax.conversion.peft_export import base_of, export_adapter

    if not is_run(run):
        raise ConfigError(
            f"{run} is no training run: expected the directory that train.py wrote, with "
            "config.json and checkpoints/ in it"
        )
    print(f"{target}: {export_adapter(run, target)} modules, ready")
    base = base_of(run)
    if base is not None and (is_run(Path(base)) or is_weights_folder(Path(base))):
        print(
            f"it fits only the weights that the run began with: make a released folder of {base} "
            "(convert.py import, convert.py export) and name that as the base"
        )


def queries(
    source: Annotated[Path, tyro.conf.arg(metavar="SRC")],
    number: Annotated[int, tyro.conf.arg(metavar="NUMBER")],
    target: Annotated[Path, tyro.conf.arg(metavar="DST")],
    /,
) -> None:
    """Writes weights with another number of queries. Example: convert.py queries weights/a 64 b

    Args:
        source: a weights folder of ours
        number: picture embeddings of a picture, a square number
        target: the new folder
    """
    from qwenvl_jax.conversion.queries import change_queries

    config = change_queries(source, target, number)
    print(f"{target}: {config.adapter.num_queries} queries, ready")


def num_bytes(text: str) -> int:
    """Returns the bytes of a size as people write it.

    >>> num_bytes("2GB")
    2000000000
    """
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.strip().isdecimal() or int(number) == 0:
        raise ConfigError(f"a size is a whole number and KB, MB or GB: got {text!r}, e.g. 2GB")
    return int(number) * _UNITS[unit]


@contextmanager
def watch(stage: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields the callback that shows how far a stage is: a bar on a terminal, else a few lines."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description:>14}"), BarColumn(), DownloadColumn())
        with Progress(
            *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console
        ) as bar:
            task = bar.add_task(stage, total=total)
            yield lambda done: bar.advance(task, done)
        return
    seen, part = 0, max(total // LINES, 10**9)

    def line(done: int) -> None:
        nonlocal seen
        before, seen = seen, seen + done
        if before // part != seen // part or seen == total:
            print(f"{stage}: {seen / 1e6:.0f} of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)

    yield line
