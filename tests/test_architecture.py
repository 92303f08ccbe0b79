"""Who may import whom (design: arrows run one way; heavy libraries stay in their rooms)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Later rooms may import earlier ones, never the other way round.
LAYERS = [
    "manifest",
    "config",
    "metrics",
    "transforms",
    "raw",
    "batch",
    "ops",
    "modalities",
    "data",
    "model",
    "losses",
    "tasks",
    "training",
    "describe",
    "evaluation",
]


def imports(path: Path) -> set[str]:
    """Absolute module names that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no files in {package}"
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", files("etl"), ids=lambda p: str(p.relative_to(ROOT)))
def test_etl_imports_no_torch_and_of_lanistr_only_manifest_and_transforms(path: Path) -> None:
    names = imports(path)
    assert not roots(names) & {"torch", "deepspeed", "transformers"}
    assert {n for n in names if n.split(".")[0] == "lanistr"} <= {"lanistr.manifest", "lanistr.transforms"}


@pytest.mark.parametrize("path", files("lanistr"), ids=lambda p: str(p.relative_to(ROOT)))
def test_lanistr_never_imports_the_etl_or_its_engines(path: Path) -> None:
    assert not roots(imports(path)) & {"etl", "duckdb", "polars", "launchers", "benchmarks", "tests"}


@pytest.mark.parametrize("path", files("lanistr"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_one_file_imports_deepspeed_and_one_torch_distributed(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    names = imports(path)
    if name != "lanistr/training/engine.py":
        assert "deepspeed" not in roots(names)
    if name != "lanistr/training/distributed.py":
        assert not any(n.startswith("torch.distributed") for n in names)


@pytest.mark.parametrize("path", files("lanistr"), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "lanistr").parts[0].removesuffix(".py")
    if room not in LAYERS:
        return  # __main__, predict, export: the outermost
    allowed = LAYERS[: LAYERS.index(room) + 1]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lanistr" and len(parts) > 1:
            assert parts[1] in allowed, f"{path.name} ({room}) imports {name}"


@pytest.mark.parametrize(
    "module", ["lanistr", "lanistr.manifest", "lanistr.transforms", "lanistr.raw", "etl", "etl.recipe"]
)
def test_import_is_light(module: str) -> None:
    heavy = "{'torch', 'duckdb', 'polars', 'transformers', 'deepspeed'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_etl_help_needs_no_torch() -> None:
    code = "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['etl', '--help']; runpy.run_module('etl', run_name='__main__')"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "build" in out.stdout
