"""What a person sees at the terminal: help, unknown commands, and errors as one line."""

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qwenvl_jax.cli import main as cli
from qwenvl_jax.cli.devices import leave_out_absent_tpu
from qwenvl_jax.cli.errors import INTERRUPTED, SUCCESS, USAGE_ERROR, is_user_error, run_command
from qwenvl_jax.cli.options import parse_options
from qwenvl_jax.config import ConfigError, MeshConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch):
    monkeypatch.delenv("QWENVL_DEBUG", raising=False)


def failing(error):
    def command(argv):
        raise error

    return command


def test_help_lists_every_command_and_loads_nothing_heavy():
    code = (
        "import sys; from qwenvl_jax.cli.main import main; code = main(['--help']);"
        "sys.exit(code or len({'jax', 'flax', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, summary in cli.COMMANDS.items():
        assert f"{name}" in done.stdout
        assert summary in done.stdout
    assert "example" in done.stdout


@pytest.mark.parametrize("name", ["infer", "chat", "eval", "demo", "plot", "data inspect"])
def test_help_says_what_happens_without_an_option(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    told = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "None}" in told, "options that may be left out"
    assert "(default: None)" not in told
    assert "left out" in told
    assert "(default: 1)" in told or name in ("demo", "plot", "data inspect")


HELP = {
    "eval": "Markdown, and all scores and answers as JSON; nothing is written if left out.",
    "data lint": "rows that do not fit are found by it, and not looked for if left out.",
    "data prepare": "Cleaning of captions: web, academic, or single rules in order.",
    "train configs/nano/stage1.py": "settings that this start may change, of a run begun before",
    "convert import": "the source and the new folder; with --vit and --llm the new folder alone",
}


@pytest.mark.parametrize("name", HELP)
def test_help_of_an_option_is_one_paragraph_without_an_empty_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100" if name.startswith("train") else "250")
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if HELP[name] in line)
    assert line.rstrip("\u2502 ").endswith(HELP[name])
    assert "(default: )" not in told
    assert "(default: None)" not in told or name.startswith("train")


def test_no_command_is_help_and_an_error(capsys):
    assert cli.main([]) == USAGE_ERROR
    assert "usage: qwenvl COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "hint"), [("infr", "qwenvl infer"), ("trian", "qwenvl train"), ("zzz", "--help")]
)
def test_an_unknown_command_names_the_nearest(typed, hint, capsys):
    assert cli.main([typed]) == USAGE_ERROR
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


def test_a_command_gets_the_words_after_its_name(monkeypatch):
    taken = []
    monkeypatch.setattr("qwenvl_jax.cli.eval.main", lambda argv: taken.append(argv) or 7)
    assert cli.main(["eval", "--seed", "3"]) == 7
    assert taken == [["--seed", "3"]]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("a.b must be positive:\n got -1"), "t: a.b must be positive: got -1\n"),
        (FileNotFoundError(2, "No such file", "x.png"), "t: No such file: 'x.png'\n"),
        (FileNotFoundError("no weights in x"), "t: no weights in x\n"),
    ],
)
def test_messages_for_people_are_one_line_and_exit_code_2(error, message, capsys):
    assert run_command("t", failing(error), []) == USAGE_ERROR
    assert capsys.readouterr().err == message


def module_function(module, body):
    names = {"__name__": module}
    exec(f"def command(argv):\n    {body}", names)
    return names["command"]


def test_a_value_error_that_our_own_raise_made_is_for_people(capsys):
    command = module_function("qwenvl_jax.room", "raise ValueError('got 3, expected 4')")
    assert run_command("t", command, []) == USAGE_ERROR
    assert capsys.readouterr().err == "t: got 3, expected 4\n"


@pytest.mark.parametrize(
    ("module", "body"),
    [
        ("qwenvl_jax.room", "return int('many')"),
        ("numpy.room", "raise ValueError('got 3, expected 4')"),
        ("qwenvl_jax.room", "raise RuntimeError('got 3')"),
    ],
)
def test_other_errors_are_bugs_and_keep_their_traceback(module, body):
    with pytest.raises((ValueError, RuntimeError)):
        run_command("t", module_function(module, body), [])


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), ValueError("x")])
def test_a_bug_keeps_its_traceback(error):
    assert not is_user_error(error)
    with pytest.raises(type(error)):
        run_command("t", failing(error), [])


def test_a_bug_does_not_wait_for_work_that_is_cut():
    lines = (
        "import atexit, sys; from qwenvl_jax.cli.errors import leave, note_cut_work, run_command",
        "atexit.register(print, 'usual end')",
        "sys.modules['jax'] = sys",
        "def command(argv):",
        "    note_cut_work()",
        "    raise KeyError('a bug')",
        "leave(run_command('t', command, []))",
    )
    done = run_python("\n".join(lines))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'a bug'\n")


def test_debug_keeps_the_traceback_of_wrong_input_too(monkeypatch):
    monkeypatch.setenv("QWENVL_DEBUG", "1")
    with pytest.raises(ConfigError):
        run_command("t", failing(ConfigError("x")), [])


def test_an_interrupt_ends_with_130(capsys):
    assert run_command("t", failing(KeyboardInterrupt()), []) == INTERRUPTED == 128 + signal.SIGINT
    assert capsys.readouterr().err == "t: interrupted\n"


def test_an_interrupt_that_python_drops_arrives_later():
    code = (
        "import gc, signal, sys, time; from qwenvl_jax.cli.errors import run_command\n"
        # Where the tests run behind a shell's `&`, it is inherited as ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def once(phase, info):\n"
        "    gc.callbacks.clear()\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "def command(argv):\n"
        "    gc.callbacks.append(once)\n"
        "    gc.collect()\n"
        "    time.sleep(60)\n"
        "sys.exit(run_command('t', command, []))"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "t: interrupted\n")


def test_what_else_python_drops_is_told_as_ever():
    code = (
        "import gc, sys; from qwenvl_jax.cli.errors import run_command\n"
        "def command(argv):\n"
        "    gc.callbacks.append(lambda phase, info: gc.callbacks.clear() or 1 / 0)\n"
        "    gc.collect()\n"
        "    return 0\n"
        "sys.exit(run_command('t', command, []))"
    )
    done = run_python(code)
    assert done.returncode == SUCCESS
    assert "ZeroDivisionError" in done.stderr


def test_a_run_ends_although_a_read_of_its_data_hangs(tmp_path):
    code = (
        "import concurrent.futures, contextlib, threading, sys\n"
        "from qwenvl_jax.cli.errors import leave\n"
        "from qwenvl_jax.cli.train import main\n"
        "from qwenvl_jax.training import feed, loop\n"
        "pool = concurrent.futures.ThreadPoolExecutor(1)\n"  # as grain has them
        "batches = (pool.submit(threading.Event().wait).result() for _ in range(9))\n"
        "def train(config, **_):\n"
        "    with contextlib.closing(feed.Feed(batches, None, patience=0.1)) as ours: next(ours)\n"
        "loop.train = train\n"
        "leave(main(sys.argv[1:]))"
    )
    done = run_python(
        code, "configs/nano/stage1.py", f"--run-dir={tmp_path}", redirect="</dev/null"
    )
    assert done.returncode == USAGE_ERROR
    assert "train: the data have stopped coming" in done.stderr


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys; from qwenvl_jax.cli.errors import run_command\n"
        "def command(argv):\n"
        "    for i in range(100000): print('line', i, flush=True)\n"
        "    return 0\n"
        "sys.exit(run_command('t', command, []))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (SUCCESS, "")


def run_python(code: str, *argv: str, redirect: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python as a shell does, with the output buffered that tests often have unbuffered."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = shlex.join([sys.executable, "-c", code, *argv])
    shell = ["bash", "-c", f"set -o pipefail; {command} {redirect}"]
    return subprocess.run(shell, check=False, capture_output=True, text=True, env=env, cwd=ROOT)


RUN_MAIN = "import sys; from qwenvl_jax.cli.main import main; sys.exit(main())"
PRINT = "import sys; from qwenvl_jax.cli.errors import run_command\n" + (
    "sys.exit(run_command('t', lambda argv: print('x') or 0, []))"
)


@pytest.mark.parametrize(
    ("code", "argv"),
    [(PRINT, ()), (RUN_MAIN, ("--help",)), (RUN_MAIN, ("--version",)), (RUN_MAIN, ("eval", "-h"))],
    ids=["print", "help", "version", "help of a command"],
)
@pytest.mark.parametrize(
    ("redirect", "status", "told"),
    [
        ("| true", SUCCESS, ""),
        (">/dev/full", USAGE_ERROR, ": standard output cannot be written: No space left on device"),
    ],
    ids=["no reader", "full"],
)
def test_what_is_printed_last_is_flushed_under_guard(code, argv, redirect, status, told):
    if redirect.startswith("|"):  # the reader is gone before a word is printed
        code = f"import time; time.sleep(0.2); {code}"
    done = run_python(code, *argv, redirect=redirect)
    assert done.returncode == status, done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == bool(told)


def test_an_error_is_told_once_where_nothing_can_be_printed():
    code = (
        "import sys; from qwenvl_jax.cli.errors import run_command\n"
        "def command(argv):\n"
        "    print('x')\n"
        "    raise FileNotFoundError('no weights')\n"
        "sys.exit(run_command('t', command, []))"
    )
    done = run_python(code, redirect=">/dev/full")
    assert (done.returncode, done.stderr) == (USAGE_ERROR, "t: no weights\n")


@pytest.mark.parametrize("redirect", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_the_null_device(redirect):
    code = (
        "import os, sys; from qwenvl_jax.cli.errors import run_command\n"
        "def command(argv):\n"
        "    assert sys.stdin.read() == '' and not sys.stderr.isatty()\n"
        "    print('out'); print('err', file=sys.stderr)\n"
        "    assert [s.fileno() for s in (sys.stdin, sys.stdout, sys.stderr)] == [0, 1, 2]\n"
        "    return 7\n"
        "sys.exit(run_command('t', command, []))"
    )
    done = run_python(code, redirect=redirect if "<" in redirect else f"{redirect} </dev/null")
    assert done.returncode == 7, done.stderr
    assert done.stdout == ("" if ">&-" in redirect.replace("2>", "") else "out\n")
    assert done.stderr == ("" if "2>&-" in redirect else "err\n")


@pytest.mark.parametrize(
    ("code", "is_noted", "has_jax", "ends_at_once"),
    [
        (INTERRUPTED, False, True, True),
        (INTERRUPTED, False, False, False),
        (SUCCESS, False, True, False),
        (SUCCESS, True, True, True),  # a dialogue that went on behind a stopped answer
        (SUCCESS, True, False, False),
    ],
)
def test_an_interrupt_under_jax_ends_the_process_at_once(code, is_noted, has_jax, ends_at_once):
    lines = (
        "import atexit, sys; from qwenvl_jax.cli.errors import leave, note_cut_work",
        "atexit.register(print, 'usual end')",
        "sys.modules['jax'] = sys" if has_jax else "",
        "note_cut_work()" if is_noted else "",
        f"print('answer'); leave({code})",
    )
    done = run_python("\n".join(lines))
    assert done.returncode == code, done.stderr
    assert done.stdout == ("answer\n" if ends_at_once else "answer\nusual end\n")


def test_every_door_leaves_by_the_same_way():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"qwenvl": f"{cli.__name__}:{cli.start.__name__}"}
    doors = [ROOT / f"{name}.py" for name in ("infer", "train", "convert")]
    for path in (*doors, *(ROOT / "qwenvl_jax" / "cli").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:
            end = "start()" if path.stem == "main" else "leave(main())"
            assert text.endswith(f'if __name__ == "__main__":\n    {end}\n'), path


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("latin-1", b"\\u72d7 caf\xe9\n"),
        ("ascii:surrogateescape", b"\\u72d7 caf\\xe9\n"),
        ("ascii:replace", b"? caf?\n"),  # somebody has decided
        ("utf-8", "狗 café\n".encode()),
    ],
)
def test_what_an_encoding_lacks_is_escaped(encoding, printed):
    code = (
        "import sys; from qwenvl_jax.cli.errors import run_command\n"
        "sys.exit(run_command('t', lambda argv: print('\\u72d7 caf\\xe9') or 0, []))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )
    assert (done.returncode, done.stdout) == (SUCCESS, printed), done.stderr


def test_options_become_fields():
    assert parse_options(MeshConfig, ["--tensor", "2"], "t") == MeshConfig(tensor=2)
    start = MeshConfig(data=4)
    assert parse_options(MeshConfig, ["--fsdp=3"], "t", default=start) == MeshConfig(data=4, fsdp=3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tensro", "2"], "Unrecognized options: --tensro, 2; did you mean --tensor?"),
        (["--tensro", "2", "--fdsp", "1"], "did you mean --tensor, and --fsdp?"),
        (["--tensor", "many"], "'many'"),
        (["is", "it?"], "options: is, it?; a text of several words needs quotes around it. For"),
        (["--tensor"], "--tensor"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(words, told):
    with pytest.raises(ConfigError) as caught:
        parse_options(MeshConfig, words, "t")
    text = str(caught.value)
    assert told in text
    assert "\n" not in text
    assert not set(text) & set("│╭╰─")
    assert "---" not in text


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("null", None, "cpu"),
        ("accel0", None, None),  # a TPU of the older kind
        ("vfio/0", None, None),
        ("null", "tpu", "tpu"),  # somebody has decided
    ],
)
def test_a_tpu_that_is_not_there_is_not_looked_for(file, before, after, tmp_path, monkeypatch):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    monkeypatch.delenv("JAX_PLATFORMS")
    if before:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name == "libtpu" else None
    )
    leave_out_absent_tpu(tmp_path)
    assert os.environ.get("JAX_PLATFORMS") == after


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--temperature", "hot"], "--temperature takes a number: got 'hot'"),
        (["--max-new-tokens", "many"], "--max-new-tokens takes a whole number: got 'many'"),
        (["--tensor", "many"], "--tensor takes a whole number: got 'many'"),
    ],
)
def test_an_option_of_another_kind_is_told_with_what_it_takes(words, told, capsys):
    assert cli.main(["infer", *words, "What?"]) == USAGE_ERROR
    assert capsys.readouterr().err == f"infer: {told}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("convert export a b --dtype bf16", "got 'bf16'; did you mean bfloat16?"),
        ("eval --dtype fp32", "got 'fp32'; did you mean float32?"),
        ("eval --dtype x", "--dtype takes one of float32, bfloat16, None: got 'x'"),
        (
            "eval --dtype fp16",
            "--dtype takes one of float32, bfloat16, None: got 'fp16'; float16 is not offered: "
            "training in it needs a scaled loss, and bfloat16 takes no more memory",
        ),
        ("eval --form all", "--form takes one of task, chat, both: got 'all'"),
    ],
)
def test_a_choice_that_is_none_is_told_with_the_nearest(words, told, capsys):
    assert cli.main(words.split()) == USAGE_ERROR
    error = capsys.readouterr().err
    assert error.endswith(f"{told}\n")
    assert "takes one of" in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "train configs/nano/stage1.py --model.lora.rank=2 --model.lora.targets=vit.*,*.attn.*",
            "--model.lora.targets takes names with spaces between: got 'vit.*,*.attn.*'; write "
            "--model.lora.targets vit.* *.attn.*",
        ),
        ("train configs/nano/stage1.py --skip-steps 3:4,5:6", "write --skip-steps 3:4 5:6"),
        ("data prepare a b --rules web,academic", "write --rules web academic"),
        (
            "data prepare scenes b --generated.tasks=caption,vqa",
            "write --generated.tasks caption v",
        ),
    ],
)
def test_names_that_are_joined_by_commas_are_told_apart(words, told, capsys):
    assert cli.main(words.split()) == USAGE_ERROR
    assert told in capsys.readouterr().err


def test_other_texts_may_hold_commas():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Texts:
        tags: tuple[str, ...] = ()

    words = ["--tags", "<a,b>", "red, or green", ","]
    assert parse_options(Texts, words, "t").tags == tuple(words[1:])
