"""The design held to the sources: layers, one table, sizes, a light import, a README whose code runs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "lowbit_rs"
CORE = ROOT / "rust" / "core" / "src"

PYTHON_LAYERS = (
    {"_native"},
    {"errors", "_post_import"},
    {"codebooks", "packed"},
    {"_backends"},
    {"_ops", "_norm_ops"},
    {"functional"},
    {"nn"},
    {"__init__"},  # `import lowbit_rs`: the public names of everything above this line
    {"files"},
    {"integrations"},
    {"compat"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
"""Modules and subpackages of lowbit_rs: each imports from lines above its own only."""

RUST_LAYERS = (
    {"error"},
    {"dtype"},
    {"codebook"},
    {"format"},
    {"storage"},
    {"norm"},
    {"reference"},
    {"cpu", "cuda"},
    {"lib"},
)
"""Modules of lowbit_core: each uses lines above its own only, so cpu and cuda never see each other."""

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS: frozenset[str] = frozenset()
"""Functions that may be longer, as `path:name`, each with its reason."""


def sources(*suffixes: str) -> list[Path]:
    """Every source file of the repository with one of the suffixes."""
    folders = (ROOT / name for name in ("rust", "python", "tests", "benches", "cuda"))
    return sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def rank(layers: tuple[set[str], ...], module: str) -> int:
    for index, names in enumerate(layers):
        if module in names:
            return index
    raise AssertionError(f"{module} stands in no layer: add it to the tables at the head of this file")


def upward(layers: tuple[set[str], ...], module: str, imported: set[str]) -> set[str]:
    """The imports of `module` that the layers do not allow."""
    return {name for name in imported - {module} if rank(layers, name) >= rank(layers, module)}


def module_of(path: Path, root: Path) -> str:
    """The module or subpackage right under `root` that a file belongs to."""
    return path.relative_to(root).parts[0].removesuffix(path.suffix)


def python_imports(path: Path) -> set[str]:
    """The parts of lowbit_rs that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    package = ["lowbit_rs", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        found |= {part_of(name) for name in names if name.split(".")[0] == "lowbit_rs"}
    return found


def part_of(name: str) -> str:
    """`lowbit_rs.nn.linear` -> `nn`; a name that `lowbit_rs` itself defines -> `__init__`."""
    first = [*name.split("."), ""][1]
    is_module = first == "_native" or (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
    return first if first and is_module else "__init__"


def rust_modules(text: str) -> set[str]:
    """The modules of the crate that a Rust source names by a path from the crate's root."""
    names = set(re.findall(r"\bcrate::([a-z]\w*)", text))
    for group in re.findall(r"\bcrate::\{(.*?)\};", text, flags=re.DOTALL):
        flat = re.sub(r"\{[^{}]*\}", "", group)
        names |= set(re.findall(r"(?:^|,)\s*([a-z]\w*)", flat))
    return names


def without_rust_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=relative)
def test_python_imports_go_one_way(path: Path) -> None:
    module = module_of(path, PACKAGE)
    assert not upward(PYTHON_LAYERS, module, python_imports(path))


def test_python_backends_do_not_see_each_other() -> None:
    backends = PACKAGE / "_backends"
    names = {path.stem for path in backends.glob("*.py") if not path.stem.startswith("_")}
    assert names == {"cpu", "cuda"}
    for name in names:
        text = (backends / f"{name}.py").read_text(encoding="utf-8")
        assert not [other for other in names - {name} if re.search(rf"import.*\b{other}\b", text)], name


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.rs")), ids=relative)
def test_rust_modules_go_one_way(path: Path) -> None:
    module = module_of(path, CORE)
    used = rust_modules(without_rust_comments(path.read_text(encoding="utf-8")))
    assert not upward(RUST_LAYERS, module, used)


def test_core_knows_neither_python_nor_torch() -> None:
    manifest = (ROOT / "rust" / "core" / "Cargo.toml").read_text(encoding="utf-8")
    assert not re.search(r"\b(pyo3|numpy|tch)\b", manifest)


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("from lowbit_rs.nn.linear import QuantLinear", "packed"),
        ("def f():\n    import lowbit_rs.cli", "nn"),
        ("from lowbit_rs import linear", "functional"),
        ("from . import functional", "_ops"),
    ],
)
def test_a_wrong_python_arrow_is_found(
    statement: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"{module}.py"
    path.write_text(statement, encoding="utf-8")
    for folder in ("nn", "cli", "functional"):
        (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    assert upward(PYTHON_LAYERS, module, python_imports(path))


def test_a_wrong_rust_arrow_is_found() -> None:
    text = "use crate::{Error, Result, dtype::{Dtype, Floats}, cpu};\nlet _ = crate::cuda::driver();"
    assert rust_modules(text) == {"dtype", "cpu", "cuda"}
    assert upward(RUST_LAYERS, "storage", rust_modules(text)) == {"cpu", "cuda"}
    assert upward(RUST_LAYERS, "cpu", {"cuda"}) == {"cuda"}


def imported_by(statement: str) -> dict[str, object]:
    """What a fresh interpreter has loaded after `statement`."""
    code = (
        f"{statement}\nimport json, sys, torch\n"
        "print(json.dumps({'modules': sorted(sys.modules), 'cuda': torch.cuda.is_initialized()}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: dict[str, object] = json.loads(run.stdout)
    return loaded


def test_import_touches_neither_cuda_nor_optional_packages() -> None:
    bare, loaded = imported_by("import torch"), imported_by("import lowbit_rs")
    modules, before = loaded["modules"], bare["modules"]
    assert isinstance(modules, list)
    assert isinstance(before, list)
    assert "lowbit_rs" in modules
    added = {name.split(".")[0] for name in set(modules) - set(before)}
    unwanted = {"accelerate", "bitsandbytes", "click", "gguf", "matplotlib", "peft", "rich", "tqdm", "transformers"}
    assert not added & unwanted
    assert not {name for name in set(modules) - set(before) if name.startswith(("torch._dynamo", "torch._inductor"))}
    assert loaded["cuda"] is False


def test_the_nf4_table_stands_in_no_source_file() -> None:
    # Found by the digits of its second smallest value. It is computed; tests and benchmarks may quote it.
    quoting = {"tests", "benches"}
    shipped = [path for path in sources(".rs", ".py", ".cu", ".cuh") if not quoting & set(path.relative_to(ROOT).parts)]
    holders = [relative(path) for path in shipped if "0.69619" in path.read_text(encoding="utf-8").replace("_", "")]
    assert not holders


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def rust_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length of each function with a body: rustfmt closes it in the column where it starts."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for start, line in enumerate(lines):
        head = re.match(r"( *)(?:pub(?:\([a-z ]+\))? )?(?:(?:const|async|unsafe|extern \"C\") )*fn (\w+)", line)
        if head is None or line.endswith(("}", ";")):
            continue
        indent, name = head.groups()
        length = next(i for i, body in enumerate(lines[start:], 1) if re.match(rf"{indent}(\}}|\).*;)$", body))
        yield name, length


def test_files_are_short() -> None:
    files = sources(".rs", ".py", ".cu", ".cuh")
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    found = set()
    for suffix, functions in ((".py", python_functions), (".rs", rust_functions)):
        for path in sources(suffix):
            found |= {f"{relative(path)}:{name}" for name, length in functions(path) if length > MAX_FUNCTION_LINES}
    assert found == LONG_FUNCTIONS


PAGES = (
    "README.md",
    "docs/architecture.md",
    "docs/checkpoints.md",
    "docs/from-bitsandbytes.md",
    "docs/int8.md",
    "docs/norms.md",
    "docs/qlora.md",
    "docs/transformers.md",
)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # PEFT calls it
@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_the_documentation_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "documentation"}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)  # noqa: S102  # the block is the thing under test


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=relative)
def test_tests_that_the_documentation_names_exist(page: Path) -> None:
    named = re.findall(r"`(?:(test_\w+\.py)(?:::)?)?(test_\w+)?(?:\[[^`]*\])?`", page.read_text(encoding="utf-8"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    for file, function in named:
        texts = [sources[file]] if file else list(sources.values())
        assert not function or any(f"def {function}(" in text for text in texts), (file, function)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=relative)
def test_links_of_the_documentation_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [name for name in targets if "://" not in name and not (page.parent / name).exists()]
    assert not missing
