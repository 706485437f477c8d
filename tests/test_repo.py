"""The house rules that a reviewer should not have to check: layers, sizes, settings, paths.

Each checker is a function from text or syntax trees to a list of findings, so that the tests at the
end can show every one of them catching a planted fault.
"""

import ast
import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwenvl_jax import config as config_module
from qwenvl_jax.cli.data import COMMANDS as DATA_COMMANDS
from qwenvl_jax.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qwenvl_jax"

# Who may import whom, besides its own room. `docs/architecture.md` draws the same picture.
BASE = {"axes", "checks", "config", "files", "words"}
HOST = BASE | {"prompt", "image", "data"}  # never jax: data workers must not start an accelerator
MATHS = BASE | {"sharding", "model"}
ALLOWED = {
    "axes": set(),
    "files": {"checks"},
    "checks": set(),
    "words": set(),
    "config": {"axes", "checks"},
    "presets": BASE,
    "sharding": BASE,
    "model": BASE | {"sharding"},
    "image": BASE,
    "prompt": BASE | {"image"},
    "data": BASE | {"prompt", "image"},
    "checkpoint": BASE | {"sharding"},
    "conversion": MATHS | {"checkpoint"},
    "inference": MATHS | {"checkpoint", "conversion", "prompt", "image"},
    "training": MATHS | {"checkpoint", "conversion"} | HOST,
    "planning": MATHS | {"checkpoint", "conversion", "inference", "training"} | HOST,
    "evaluation": MATHS | {"checkpoint", "conversion", "inference", "training"} | HOST,
    "cli": MATHS
    | {"checkpoint", "conversion", "inference", "training", "evaluation", "planning"}
    | HOST,
    "__init__": MATHS | {"checkpoint", "conversion", "inference", "evaluation"} | HOST,
}
HOST_ROOMS = ("prompt", "image", "data")
ACCELERATOR = {"jax", "jaxlib", "flax", "optax", "orbax"}

MAX_FILE_LINES = 400  # 300 is the aim
MAX_FUNCTION_LINES = 60
GRAB_BAGS = {"utils", "util", "helpers", "common", "misc", "tools"}


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def python_files() -> list[Path]:
    folders = [PACKAGE, ROOT / "tests", ROOT / "configs", ROOT / "benchmarks"]
    return sorted([*ROOT.glob("*.py"), *(path for f in folders for path in f.rglob("*.py"))])


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def attributes_read_outside_config() -> set[str]:
    return attributes_read([tree_of(path) for path in package_files() if path.stem != "config"])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- checkers -----------------------------------------------------------------------------------


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields every module name that the tree imports, at the top or inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_imports(room: str, tree: ast.AST) -> list[str]:
    """Returns the imports of a module of `room` that go against the layers, or hide theirs."""
    wrong = []
    for name in imported(tree):
        if name.startswith("."):
            wrong.append(name)
        parts = name.split(".")
        if parts[0] in ACCELERATOR and room in HOST_ROOMS:
            wrong.append(name)
        if parts[0] == "qwenvl_jax" and len(parts) > 1:
            target = parts[1]
            if target in ALLOWED and target != room and target not in ALLOWED[room]:
                wrong.append(name)
    return wrong


def long_functions(tree: ast.AST) -> list[str]:
    """Returns `name (lines)` of each function that is too long to read in one go."""
    return [
        f"{node.name} ({node.end_lineno - node.lineno + 1})"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def stubs(tree: ast.AST) -> list[str]:
    """Returns functions that promise something and do nothing; a Protocol only describes."""
    found = []
    described = {
        id(node)
        for part in ast.walk(tree)
        if isinstance(part, ast.ClassDef) and any(_named(base, "Protocol") for base in part.bases)
        for node in part.body
    }
    for node in ast.walk(tree):
        if id(node) in described:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if all(isinstance(line, ast.Pass) or _is_ellipsis(line) for line in body):
                found.append(node.name)
    return found


def _named(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_ellipsis(line: ast.stmt) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and line.value.value is Ellipsis
    )


def attributes_read(trees: list[ast.AST]) -> set[str]:
    return {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


# Letters in brackets keep this file from finding itself.
FOREIGN = re.compile(
    r"(?<![\w.:/])/(?:r[o]ot|h[o]me|w[o]rk|f[a]rm|Us[e]rs|opt/p[y]pi|t[m]p/[a-z])(?:/|\b)"
    r"|p[y]pi\.org|pyth[o]nhosted|regis[t]ry\.npm|--(?:extra-)?ind[e]x-url|--find-l[i]nks"
)


def foreign_lines(text: str) -> list[str]:
    """Returns the lines that name a folder of somebody's machine or a package registry."""
    return [line.strip()[:120] for line in text.splitlines() if FOREIGN.search(line)]


def code_of(markdown: str) -> list[str]:
    """Returns inline code and the lines of code blocks."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, flags=re.M | re.S)
    outside = re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [*lines, *re.findall(r"`([^`\n]+)`", outside)]


PATH_IN_CODE = re.compile(
    r"(?<![\w/.<-])((?:qwenvl_jax|configs|tests|docs|benchmarks|\.ci)/[\w./-]+|[\w-]+\.(?:py|md|toml))"
    r"(?![\w/*{])"
)


def missing_paths(markdown: str, page: Path, root: Path) -> list[str]:
    """Returns what a page's code and links name and the tree lacks; links start at the page."""
    named = {m for code in code_of(markdown) for m in PATH_IN_CODE.findall(code)}
    links = set(re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", markdown))
    by_name = {path.name for path in python_files()}
    missing = {path for path in named if not (root / path).exists() and path not in by_name}
    return sorted(missing | {link for link in links if not (page.parent / link).exists()})


def wrong_commands(markdown: str, targets: set[str]) -> list[str]:
    """Returns the `make` targets and `qwenvl` commands of a page that do not exist."""
    wrong = []
    for code in code_of(markdown):
        for command in re.findall(r"(?:^|[;&|]\s*|\$\s+)make (?:\w+=\S+ )*(\w+)", code):
            wrong += [f"make {command}"] * (command not in targets)
        for command in re.findall(r"(?:^|[;&|]\s*|\$\s+)qwenvl (\w+)", code):
            wrong += [f"qwenvl {command}"] * (command not in COMMANDS)
    return wrong


def make_targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.M))


# --- the tree -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", package_files(), ids=name_of)
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{room} is a new room: say in tests/test_repo.py what it may import"
    assert wrong_imports(room, tree_of(path)) == []


HIDE_ACCELERATORS = """
import importlib, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"jax", "jaxlib", "flax"}:
            raise ImportError(f"{name} is hidden")

sys.meta_path.insert(0, Hide())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_host_rooms_import_where_jax_is_not_installed():
    modules = [
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in package_files()
        if path.relative_to(PACKAGE).parts[0] in HOST_ROOMS
    ]
    assert len(modules) > 5
    run = [sys.executable, "-c", HIDE_ACCELERATORS, *modules, "qwenvl_jax.cli.main"]
    done = subprocess.run(run, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def config_classes() -> list[type]:
    return [
        value
        for value in vars(config_module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    ]


@pytest.mark.parametrize("kind", config_classes(), ids=lambda kind: kind.__name__)
def test_every_setting_is_read_somewhere(kind):
    read = attributes_read_outside_config()
    dead = [field.name for field in dataclasses.fields(kind) if field.name not in read]
    assert dead == [], f"{kind.__name__} has settings that nothing outside config.py reads"


@pytest.mark.parametrize("path", python_files(), ids=name_of)
def test_files_and_functions_stay_readable(path):
    tree = tree_of(path)
    assert long_functions(tree) == []
    assert path.stem not in GRAB_BAGS
    if not path.is_relative_to(ROOT / "tests"):  # tables of cases may be long
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
        assert stubs(tree) == []


def test_no_folder_of_the_package_holds_a_single_module():
    folders = {path.parent for path in package_files()} - {PACKAGE}
    lonely = [name_of(f) for f in folders if len([*f.glob("*.py"), *f.glob("*/*.py")]) < 3]
    assert sorted(lonely) == [], "__init__.py and one module: make it a file"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=name_of)
def test_every_config_builds(path):
    spec = importlib.util.spec_from_file_location("config_under_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__doc__, "a config's docstring says its command, its cost and what to expect"
    assert isinstance(module.get_config(), config_module.TrainConfig)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", pages(), ids=name_of)
def test_pages_name_what_exists(path):
    text = path.read_text(encoding="utf-8")
    assert missing_paths(text, path, ROOT) == []
    assert wrong_commands(text, make_targets()) == []


def options_of(page: str, door: str) -> set[str]:
    """Returns the `--options` that a page's code gives to `python door.py` or `qwenvl door`."""
    joined = re.sub(r"\\\n\s*", " ", page)
    lines = [
        line
        for line in code_of(joined)
        if re.search(rf"(?<!\w)(?:{door}\.py|qwenvl {door})\b", line)
    ]
    return {option for line in lines for option in re.findall(r"(?<=\s)--[a-z][\w.-]*", line)}


def help_of(door: str, *words: str) -> str:
    run = [sys.executable, "-m", "qwenvl_jax.cli.main", door, *words, "--help"]
    done = subprocess.run(run, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def written_commands() -> list[str]:
    return [name for name in DATA_COMMANDS if (PACKAGE / "cli" / f"data_{name}.py").exists()]


@pytest.mark.parametrize("door", sorted(COMMANDS))
def test_options_in_the_pages_exist(door):
    used = set().union(*(options_of(path.read_text(encoding="utf-8"), door) for path in pages()))
    shown = help_of(door)
    assert len(re.findall(rf"{door}\.py|qwenvl {door}", shown)) > 1, "usage, and an example"
    if door == "data":  # its commands have the options
        shown += "".join(help_of(door, name) for name in written_commands())
    if door in ("train", "plan"):  # the fields of the config are options
        shown += help_of("train", "configs/nano/stage1.py")
    assert used - set(re.findall(r"--[a-z][\w.-]*", shown)) - {"--help"} == set()


def our_text_files() -> list[Path]:
    single = ["Makefile", "pyproject.toml", "constraints.txt", ".pre-commit-config.yaml", ".ci/run"]
    return [*python_files(), *pages(), *(ROOT / name for name in single)]


@pytest.mark.parametrize("path", our_text_files(), ids=name_of)
def test_no_line_belongs_to_one_machine(path):
    assert foreign_lines(path.read_text(encoding="utf-8")) == []


def third_party_imports() -> set[str]:
    roots = {name.split(".")[0] for path in package_files() for name in imported(tree_of(path))}
    return roots - set(sys.stdlib_module_names) - {"qwenvl_jax"}


def test_what_the_package_imports_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["plot"], *extras["generate"], *extras["beam"]]
    declared = {re.split(r"[\[>=]", line)[0].lower().replace("-", "_") for line in wanted}
    names = {"PIL": "pillow", "orbax": "orbax_checkpoint", "absl": "absl_py"}
    used = {names.get(root, root).lower() for root in third_party_imports()}
    assert used - declared == set(), "imported and not declared"
    assert declared - used == set(), "declared and not imported"


def test_constraints_are_plain_pins():
    lines = (ROOT / "constraints.txt").read_text().split("\n")[:-1]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert {"jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "pytest"} <= pinned


# --- the checkers catch what they are for ---------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("model", "from qwenvl_jax.training import step"),
        ("model", "import qwenvl_jax.prompt.tokenizer"),
        ("data", "def f():\n    import jax.numpy"),
        ("image", "from flax import nnx"),
        ("training", "from qwenvl_jax import inference"),
        ("checkpoint", "from qwenvl_jax.model.qwenvl import QwenVL"),
        ("conversion", "from . import reader"),
    ],
)
def test_a_wrong_import_is_found(room, source):
    assert wrong_imports(room, ast.parse(source)) != []


def test_a_right_import_is_not():
    source = (
        "import jax\nfrom qwenvl_jax.sharding import make_mesh\nfrom qwenvl_jax.model import vit"
    )
    assert wrong_imports("model", ast.parse(source)) == []


def test_long_and_empty_functions_are_found():
    body = "\n".join(f"    x{i} = {i}" for i in range(MAX_FUNCTION_LINES))
    assert long_functions(ast.parse(f"def f():\n{body}")) == [f"f ({MAX_FUNCTION_LINES + 1})"]
    assert stubs(ast.parse('def f():\n    """Returns."""\n    ...')) == ["f"]
    assert stubs(ast.parse('def f():\n    """Returns."""\n    return 1')) == []
    assert stubs(ast.parse("class A(B):\n    def f(self): ...")) == ["f"]
    assert stubs(ast.parse("class A(Protocol):\n    def f(self): ...")) == []


def test_a_setting_that_is_only_written_counts_as_dead():
    assert "gone" not in attributes_read([ast.parse("config.gone = 1")])
    assert "used" in attributes_read([ast.parse("x = config.used")])


@pytest.mark.parametrize(
    "line",
    [
        "/ho" + "me/someone/x",
        "x = '/wo" + "rk/main'",
        "--ind" + "ex-url x",
        "files.pyth" + "onhosted.org",
    ],
)
def test_a_machine_path_is_found(line):
    assert foreign_lines(line) == [line]


def test_a_missing_path_or_command_is_found(tmp_path):
    page = (
        "see `qwenvl_jax/nothing.py` and [x](docs/none.md)\n```\npython gone.py\nmake tset\n```\n"
    )
    assert missing_paths(page, tmp_path / "page.md", tmp_path) == [
        "docs/none.md",
        "gone.py",
        "qwenvl_jax/nothing.py",
    ]
    assert wrong_commands(page + "`qwenvl infre`", {"test"}) == ["make tset", "qwenvl infre"]
