"""`qwenvl plan CONFIG --topology v5e-256`: will it fit, on what, how fast; asked on a laptop."""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.cli.config_file import read_config
from qwenvl_jax.cli.errors import SUCCESS, USAGE_ERROR, leave, run_command
from qwenvl_jax.cli.host_memory import give_freed_memory_back
from qwenvl_jax.cli.options import option_names, parse_options
from qwenvl_jax.config import ConfigError, TrainConfig, to_dict
from qwenvl_jax.files import json_text
from qwenvl_jax.words import counted

DOES_NOT_FIT = 1
_TRAINING = "a plan without --serve"
_LOAD = ("rows", "prompt", "answer", "images")
_WITHOUT = {  # what has no place in each way of planning
    "an estimate for GPUs": (
        *("slices", "serve", "search", "tries", "page", "executable", "cache"),
        *_LOAD,
    ),
    "--serve": ("search", "tries", "page", "executable", "cache"),
    "--search": ("executable", *_LOAD),
    _TRAINING: _LOAD,
}

_USAGE = """usage: qwenvl plan CONFIG --topology NAME [options] [--a.b=c ...]

Compiles the very step that train.py runs for a TPU pod, with the TPU compiler and no TPU, and
prints the memory of a chip by what lies in it, the work of a step, what crosses the links, and a
bound on the time of a step. Any field of the config can be changed as in train.py. Where the run
does not fit a pod, the nearest setting that does is looked for, compiled, and printed as options;
for GPUs nothing is compiled, and what can help is named.

  --topology NAME    v4-256, v5e-256, v5p-256, v6e-256, ...; names of v4 and v5p count cores, two
                     a chip. h100-8, a100-80-8, l4-1, ...: GPUs, an estimate from shapes alone
  --slices N         equal slices joined by the data-centre network (1)
  --search           find the fastest setting that fits: mesh splits, micro-batches, remat
  --tries N          settings to compile for a suggestion; of a search, that fit (6)
  --serve            plan prefill and decode instead of a training step, in bf16:
  --rows N --prompt N --answer N --images N    what is asked at once (8, 1024, 256, 1)
  --json FILE        write the plan as JSON
  --page FILE        write the plan as an HTML page with charts
  --executable FILE  write the serialised executable
  --cache DIR        where compiled programs are kept (~/.cache/qwenvl_jax/plans)

examples:
  qwenvl plan configs/stage2_multitask.py --topology v5e-256
  qwenvl plan configs/stage1_pretrain.py --topology v5e-256 --slices 2
  qwenvl plan configs/stage3_chat.py --topology v6e-8 --search --tries 12
  qwenvl plan configs/stage3_chat.py --topology v5e-4 --mesh.tensor=4 --mesh.fsdp=1 --serve
  qwenvl plan configs/stage3_chat.py --topology h100-8

exit codes: 0 it fits; 1 it does not; 2 a wrong command or setting, or no TPU compiler
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What to plan for, and what to do with the plan."""

    topology: str
    slices: int = 1
    search: bool = False
    tries: int = 6
    serve: bool = False
    rows: int = 8
    prompt: int = 1024
    answer: int = 256
    images: int = 1
    json: str | None = None
    page: str | None = None
    executable: str | None = None
    cache: str = "~/.cache/qwenvl_jax/plans"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("plan", _run, argv)


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print(_USAGE, end="")
        return SUCCESS if argv and argv[0] in ("-h", "--help") else USAGE_ERROR
    if {"-h", "--help"} & set(argv):
        print(f"{_USAGE}\nsettings of the config:")  # which the parser prints, and ends
    ours, overrides = split_options(argv[1:])
    # The config's first: an option that is neither's may be a misspelt one of ours.
    config = read_config(argv[0], overrides, "qwenvl plan", option_names(PlanOptions))
    options = parse_options(PlanOptions, ours, prog="qwenvl plan")
    # The TPU compiler runs on the host; an accelerator of this machine would only be held.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from qwenvl_jax.planning.gpus import find_gpus, gpu_text
    from qwenvl_jax.planning.pods import find_pod

    gpus = find_gpus(options.topology)
    modes = {"an estimate for GPUs": gpus, "--serve": options.serve, "--search": options.search}
    _check(options, next((name for name, is_on in modes.items() if is_on), _TRAINING))
    if gpus is not None:
        text, row, fits = gpu_text(config, gpus)
        print(text)
        _write(options.json, row)
        return SUCCESS if fits else DOES_NOT_FIT
    give_freed_memory_back()
    pod = find_pod(options.topology, options.slices)
    if options.serve:
        return _serve(config, pod, options)
    if options.search:
        return _search(config, pod, options)
    return _plan(config, pod, options)


def _check(options: PlanOptions, mode: str) -> None:
    """Raises ConfigError for an option that could have no effect, for no tries, and for a file
    that could not be written once minutes were spent on what belongs in it."""
    if options.tries < 1:
        raise ConfigError(f"--tries must be at least 1: got {options.tries}")
    usual = {field.name: field.default for field in dataclasses.fields(PlanOptions)}
    given = [f"--{name}" for name in _WITHOUT[mode] if getattr(options, name) != usual[name]]
    if given:
        raise ConfigError(f"{mode} and {' '.join(given)} do not go together: leave one out")
    for name in ("json", "page", "executable"):
        path = Path(getattr(options, name) or "plan")
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(
                f"--{name} cannot be written: got {str(path)!r}, expected a file in a folder that "
                "exists and can be written to"
            )


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (options of this command, options of the config), in their order.

    >>> split_options(["--topology", "v5e-8", "--mesh.fsdp=8"])
    (['--topology', 'v5e-8'], ['--mesh.fsdp=8'])
    """
    names = {f"--{field.name}" for field in dataclasses.fields(PlanOptions)}
    ours: list[str] = []
    rest: list[str] = []
    target = rest
    for word in argv:
        if word.startswith("--"):
            target = ours if word.split("=")[0] in names else rest
        target.append(word)
    return ours, rest


def _plan(config: TrainConfig, pod: Any, options: PlanOptions) -> int:
    from qwenvl_jax.planning.compile import compile_step, save_executable
    from qwenvl_jax.planning.plan import describe, make_plan
    from qwenvl_jax.planning.report import plan_text
    from qwenvl_jax.planning.search import nearest_fit

    programs = _programs(options)
    planner = functools.partial(make_plan, programs=programs)
    _say(f"compiling for {pod.title}: minutes at full size, at once if it was compiled before")
    compiled = compile_step(config, pod, programs, anew=options.executable is not None)
    plan = describe(compiled, pod)
    print(plan_text(plan), flush=True)
    _write(options.json, to_dict(plan))
    _write_page(options.page, plan)
    if options.executable and plan.fits:
        save_executable(compiled, options.executable)
    if plan.fits:
        return SUCCESS
    _say("looking for the nearest setting that fits")
    found = nearest_fit(config, pod, plan=planner, tries=options.tries, say=_say)
    if found is None:
        print(f"nothing near fits within {options.tries} tries; --search looks further")
    else:
        setting, fitting = found
        print(f"FITS: {setting.options()}\n\n{plan_text(fitting)}")
    return DOES_NOT_FIT


def _search(config: TrainConfig, pod: Any, options: PlanOptions) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from qwenvl_jax.planning.plan import make_plan
    from qwenvl_jax.planning.report import TABLE_HEAD, plan_text, table_row
    from qwenvl_jax.planning.search import search

    planner = functools.partial(make_plan, programs=_programs(options))
    found = []
    console = Console(stderr=True)
    with Progress(console=console) as bar:
        task = bar.add_task("compiling", total=options.tries)
        for setting, plan in search(config, pod, plan=planner, tries=options.tries):
            found.append((setting, plan))
            bar.advance(task, plan.fits)
            console.print(f"{'fits' if plan.fits else 'does not fit'}: {setting.options()}")
    print(TABLE_HEAD)
    for setting, plan in found:
        print(table_row(setting.options(), plan))
    fitting = [(plan.bound.scheduled, s, plan) for s, plan in found if plan.bound is not None]
    _write(options.json, [to_dict(plan) for _, plan in found])
    if not fitting:
        tried = counted(len(found), "setting")
        print(f"\n{tried} tried, none fits {pod.title}; try a larger pod")
        return DOES_NOT_FIT
    _, setting, plan = min(fitting, key=lambda row: row[0])
    print(f"\nfastest of {len(found)}: {setting.options()}\n\n{plan_text(plan)}", flush=True)
    _write_page(options.page, plan)
    return SUCCESS


def _serve(config: TrainConfig, pod: Any, options: PlanOptions) -> int:
    from qwenvl_jax.planning.serving import Load, serving_plan, serving_text

    load = Load(
        rows=options.rows, prompt=options.prompt, answer=options.answer, images=options.images
    )
    phases = serving_plan(config.model, load, config.mesh, pod)
    print(serving_text(phases, load, pod))
    _write(options.json, [to_dict(phase) for phase in phases])
    return DOES_NOT_FIT if any(phase.refusal for phase in phases) else SUCCESS


def _programs(options: PlanOptions) -> Any:
    from qwenvl_jax.planning.cache import ProgramCache

    return ProgramCache(Path(options.cache).expanduser())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(path: str | None, row: Any) -> None:
    if path:
        Path(path).write_text(json_text(row), encoding="utf-8")


def _write_page(path: str | None, plan: Any) -> None:
    from qwenvl_jax.planning.page import plan_page

    if path:
        Path(path).write_text(plan_page(plan), encoding="utf-8")


if __name__ == "__main__":
    leave(main())
