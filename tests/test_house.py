"""The rules of the house, as far as they can be read off the source. Import order between rooms is import-linter's."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("shared", "cache_builder", "trainer", "dashboard")
FOLDERS = (*PRODUCT, "demo", "benchmarks")
MOST_LINES = 400
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PRODUCT_FILES = [path for path in FILES if path.relative_to(ROOT).parts[0] in PRODUCT]
VAGUE = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "tools"}
COMMANDS = {
    "cache_builder.cli": ("cache_build", "cache_serve", "cache_store"),
    "trainer.cli": ("train_expert", "generate_images", "evaluate_experts", "bundle_experts"),
    "dashboard.cli": ("cache_dashboard",),
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, wherever in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def over(files: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """A rule that each of `files` keeps: one test, for one of each file and rule would be thousands."""

    def test_of(rule: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            for path in files:
                try:
                    rule(path)
                except AssertionError as error:
                    raise AssertionError(f"{name(path)}: {error}") from None

        test.__name__, test.__doc__ = rule.__name__, rule.__doc__
        return test

    return test_of


every_file, product_file = over(FILES), over(PRODUCT_FILES)


def test_there_is_a_house() -> None:
    assert len(PRODUCT_FILES) > 30
    assert {path.relative_to(ROOT).parts[0] for path in PRODUCT_FILES} == set(PRODUCT)


# --- nothing that came along is executed ---

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "imp"}
FORBIDDEN_CALLS = {
    "torch.load", "torch.hub.load", "torch.jit.load", "np.load", "numpy.load", "yaml.load", "eval", "exec", "os.system",
}  # fmt: skip
MEASURED = {"benchmarks/store_read.py": {"torch.load"}}  # a peer's layout, read beside ours from what was just written
FORBIDDEN_ARGUMENTS = {"allow_pickle": True, "trust_remote_code": True, "shell": True, "use_safetensors": False}


@every_file
def test_no_door_for_code_in_data(path: Path) -> None:
    assert not {module.split(".")[0] for module in imports(path)} & FORBIDDEN_IMPORTS
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            measured = dotted(node.func) in MEASURED.get(name(path), ()) and "weights_only=True" in ast.unparse(node)
            assert measured or dotted(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_ARGUMENTS:
                    forbidden = FORBIDDEN_ARGUMENTS[keyword.arg]
                    said = isinstance(keyword.value, ast.Constant) and keyword.value.value is not forbidden
                    assert said, f"line {node.lineno}: {keyword.arg}"


@every_file
def test_weights_are_loaded_from_safetensors_alone(path: Path) -> None:
    """What loads a model says so; tokenizers, schedulers and configs hold no tensors."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained"):
            owner = dotted(node.func).removesuffix(".from_pretrained")
            given = {keyword.arg for keyword in node.keywords}
            tensorless = ("Tokenizer", "Scheduler", "scheduler", "Config", "Processor")
            assert "use_safetensors" in given or any(word in owner for word in tensorless), f"line {node.lineno}"


# --- one way down ---


@product_file
def test_towers_never_mention_each_other(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    allowed = {"shared"} | {own}
    used = {module.split(".")[0] for module in imports(path)} & {*FOLDERS, "tests"}
    assert used <= allowed


@pytest.mark.parametrize("module", ["schedule", "conditioning", "latents"])
def test_the_maths_stands_on_torch_alone(module: str) -> None:
    for used in imports(ROOT / "shared" / f"{module}.py"):
        top = used.split(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names or used.startswith("shared.errors.")


@every_file
def test_imports_are_absolute(path: Path) -> None:
    assert not [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level]


HEAVY = ["torch", "diffusers", "transformers", "accelerate"]
LOADS = """
import json, sys
import {module}
print(json.dumps([name for name in {heavy} if name in sys.modules]))
"""


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_start_without_heavy_libraries(module: str) -> None:
    loads = LOADS.format(module=module, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", loads], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("module", "command"), [(m, command) for m, commands in COMMANDS.items() for command in commands]
)
def test_every_command_of_the_project_is_there(module: str, command: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    assert command in {node.name for node in tree(path).body if isinstance(node, ast.FunctionDef)}
    assert f'"{module}:{command}"' in (ROOT / "pyproject.toml").read_text()


# --- small, named, explained ---


@every_file
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@every_file
def test_names_say_what_is_inside(path: Path) -> None:
    assert not {part.removesuffix(".py") for part in path.relative_to(ROOT).parts} & VAGUE


@every_file
def test_the_module_says_where_it_stands(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@product_file
def test_what_is_public_is_explained(path: Path) -> None:
    """Functions, classes and methods; a protocol's method or a property of one line included."""
    silent = []
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            silent += [] if ast.get_docstring(node) else [node.name]
            inside = node.body if isinstance(node, ast.ClassDef) else []
            methods = [member for member in inside if isinstance(member, ast.FunctionDef)]
            silent += [
                f"{node.name}.{method.name}"
                for method in methods
                if not method.name.startswith("_") and not ast.get_docstring(method)
            ]
    assert silent == []


@product_file
def test_fields_of_configs_are_explained(path: Path) -> None:
    """Each field of a Config is followed by a sentence; a section is explained by its class."""
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef) and {dotted(base) for base in node.bases} & {"Config", "BaseModel"}:
            body = [*node.body, ast.Pass()]
            for member, following in pairwise(body):
                if isinstance(member, ast.AnnAssign) and not _is_section(member):
                    said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert said, f"{node.name}.{ast.unparse(member.target)}"


def _is_section(field: ast.AnnAssign) -> bool:
    """Whether a field is a table with a class of its own: `images: ImageRules = ImageRules()`."""
    return isinstance(field.value, ast.Call) and dotted(field.value.func) == ast.unparse(field.annotation)


@every_file
def test_no_exception_is_swallowed_whole(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_file_keeps_the_marks_of_a_merge() -> None:
    marks = subprocess.run(
        ["git", "grep", "-lE", "^(<{7}|>{7}) "], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert marks.stdout == ""
