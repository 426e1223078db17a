"""Structure of the code, read from its syntax trees: imports point down, files and functions stay short."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import far

ROOT = Path(far.__file__).parent

# From the ground up. The first matching pattern counts. A module may import modules of lower floors, and of
# its own floor within its own package.
FLOORS = [
    (
        0,
        (
            "far.errors",
            "far.files",
            "far.config",
            "far.interrupt",
            "far.lazy",
            "far.notices",
            "far.precision",
            "far.tokens",
            "far.layers",
            "far.kernels",
            "far.packing",
            "far.compiling",
            "far.colors",
            "far.pictures",
            "far.editing",
            "far.processes",
            "far.pickles",
            "far.classes",
            "far.seeds",
            "far.devices",
        ),
    ),
    (
        1,
        (
            "far.autoencoder",
            "far.autoencoder_config",
            "far.diffusers_autoencoder",
            "far.diffusers_config",
            "far.tokenizer",
            "far.backbone*",
            "far.heads*",
            "far.evaluation",
            "far.evaluation.features",
            "far.evaluation.inception",
            "far.evaluation.metrics",
            "far.data.shards",
            "far.data.avatar_styles",
        ),
    ),
    (
        2,
        (
            "far.model",
            "far.model_config",
            "far.sampling_config",
            "far.folder_config",
            "far.card",
            "far.hub",
            "far.names",
        ),
    ),
    (3, ("far.sampling", "far.recording", "far.weights", "far.diffusers_files", "far.folder", "far.testing")),
    (4, ("far.pipeline", "far.progress", "far.data*")),
    (
        5,
        (
            "far",
            "far.benchmark*",
            "far.convert",
            "far.demo*",
            "far.diffusers_format",
            "far.diffusers_pipeline",
            "far.training*",
            "far.evaluation*",
            "far.onnx*",
        ),
    ),
    (6, ("far.recipe", "far.recipe_keys", "far.recipe_new")),
    (7, ("far.cli*",)),
    (8, ("far.__main__",)),
]


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def floor(module: str) -> int:
    for number, patterns in FLOORS:
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"{module} has no floor; add it to FLOORS in {Path(__file__).name}")


def package(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """The modules of far that a module imports, anywhere in it, with the lines."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package(module).split(".")
            parts = start[: len(start) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            # A name imported from a package may be one of its modules.
            names = [name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "far")


def test_modules_are_found() -> None:
    assert {"far", "far.tokens", "far.heads.shortcut", "far.cli.main"} <= MODULES.keys()
    assert "far.heads.network" in dict(imports("far.heads.shortcut"))
    assert "far.cli.generate" in dict(imports("far.cli.main")), "modules imported from a package are not seen"


def test_every_module_has_a_floor() -> None:
    for module in MODULES:
        floor(module)


def test_imports_point_down() -> None:
    wrong = []
    for module in sorted(MODULES):
        for target, line in imports(module):
            assert target in MODULES, f"{module} imports {target}, which does not exist"
            beside = floor(target) == floor(module) and package(target) == package(module)
            if floor(target) >= floor(module) and not beside:
                wrong.append(
                    f"{MODULES[module].relative_to(ROOT.parent)}:{line}: {module} (floor {floor(module)}) "
                    f"imports {target} (floor {floor(target)})"
                )
    assert not wrong, "imports must point to a lower floor:\n" + "\n".join(wrong)


def test_every_module_has_a_docstring() -> None:
    silent = [
        module
        for module, path in MODULES.items()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_pickles_are_read_in_one_place() -> None:
    pattern = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler")
    assert {
        module for module, path in MODULES.items() if pattern.search(path.read_text(encoding="utf-8"))
    } == {"far.pickles"}


def test_private_operators_of_torch_are_called_in_one_place() -> None:
    pattern = re.compile(r"torch\.ops\.(?!aten)|torch\._make|backends\.quantized")
    found = {module for module, path in MODULES.items() if pattern.search(path.read_text(encoding="utf-8"))}
    assert found == {"far.kernels"}


# --- Sizes
# ----------------------------------------------------------------------------------------------------

MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 60, 8
# A docstring stands alone: it begins with a verb or a noun.
DEPENDENT = re.compile(r"(What|Where|How|Whether|Of|The same)\b")
SOURCES = sorted(path for folder in ("far", "benchmarks") for path in (ROOT.parent / folder).rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(*kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Every definition of these kinds in far and benchmarks, with its place."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds):
                name = getattr(node, "name", "")
                yield f"{path.relative_to(ROOT.parent)}:{getattr(node, 'lineno', 1)} {name}", node


def test_files_are_short() -> None:
    lines = {str(path.relative_to(ROOT.parent)): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lines) > 100, "files are not found"
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}


def test_functions_are_short() -> None:
    lines = {
        place: node.end_lineno - node.lineno + 1  # type: ignore[attr-defined]
        for place, node in definitions(ast.FunctionDef, ast.AsyncFunctionDef)
    }
    assert len(lines) > 500, "functions are not found"
    assert not {place: count for place, count in lines.items() if count > MOST_FUNCTION_LINES}


def test_parameter_lists_are_short() -> None:
    long = {}
    for place, node in definitions(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, Function)
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [parameter.arg for parameter in every if parameter.arg not in ("self", "cls")]
        if len(names) > MOST_PARAMETERS:
            long[place] = len(names)
    assert not long


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    found = []
    for place, node in definitions(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef):
        text = ast.get_docstring(node) or ""  # type: ignore[arg-type]
        if place.startswith("far") and DEPENDENT.match(text):
            found.append(f"{place}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)
