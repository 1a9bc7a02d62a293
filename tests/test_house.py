"""The rules of the house: who may import whom, what an import may do, where things lie."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# each may import itself and those before it
LAYERS = ["kernels", "quant", "model", "eval", "cli"]
MAY_USE_TRANSFORMERS = {"model", "eval"}
EXTRAS = {
    "bitsandbytes",
    "datasets",
    "matplotlib",
    "lm_eval",
    "gguf",
    "scipy",
    "plotly",
    "ray",
    "peft",
    "pytest",
    "hypothesis",
}
# no oracle, no kernel needs more (DESIGN: "imports torch and triton only")
KERNELS_MAY_USE = {"torch", "triton"} | set(sys.stdlib_module_names)
MOST_LINES = 400


def sources() -> list[Path]:
    found = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    assert len(found) > 30, "the sources were not found, so nothing below would be checked"
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST, package: list[str], top: bool = True) -> Iterator[tuple[str, int, bool]]:
    """(absolute name, line, whether it runs when the module is imported) of every import below ``tree``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{stem}.{alias.name}", node.lineno, top) for alias in node.names)
        else:
            runs = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                runs = False
            yield from imports(node, package, runs)


def imports_of(path: Path) -> list[tuple[str, int, bool]]:
    package = ["brise", *path.relative_to(ROOT).parent.parts]
    return list(imports(ast.parse(path.read_text()), package))


def offences(path: Path) -> Iterator[str]:
    layer = path.relative_to(ROOT).parts[0]
    text = path.read_text()
    for target, line, runs in imports_of(path):
        where = f"{name(path)}:{line}: imports {target}"
        first, second = ([*target.split("."), ""])[:2]
        if first == "brise":
            if second not in LAYERS:
                yield f"{where}: no such folder"
            elif LAYERS.index(second) > LAYERS.index(layer):
                yield f"{where}: {layer} may not import {second}"
            if re.match(r"\s*(from|import) brise\b", text.splitlines()[line - 1]):
                yield f"{where}: imports inside the library are relative"
        elif first in LAYERS:
            yield f"{where}: that is the folder, not the package brise.{first}"
        elif first == "transformers" and layer not in MAY_USE_TRANSFORMERS:
            yield f"{where}: transformers is for {' and '.join(sorted(MAY_USE_TRANSFORMERS))}"
        elif first in EXTRAS and runs:
            yield f"{where}: an extra is imported inside the function that uses it"
        elif layer == "kernels" and first not in KERNELS_MAY_USE:
            yield f"{where}: kernels import torch and triton only"


def test_imports_point_downwards_and_extras_are_imported_where_they_are_used():
    assert [o for path in sources() for o in offences(path)] == []


@pytest.mark.parametrize(
    "path, line, says",
    [
        ("quant/x.py", "from ..model.cache import RollingCache", "quant may not import model"),
        ("kernels/x.py", "def f():\n    from ..quant import packing", "kernels may not import quant"),
        ("quant/interop/x.py", "from ...eval import data", "quant may not import eval"),
        ("quant/x.py", "import transformers", "transformers is for"),
        ("cli/x.py", "def f():\n    import transformers.cache_utils", "transformers is for"),
        ("eval/x.py", "try:\n    import bitsandbytes\nexcept ImportError:\n    pass", "an extra is imported"),
        ("model/x.py", "class A:\n    import scipy.linalg", "an extra is imported"),
        ("model/x.py", "import quant.config", "that is the folder"),
        ("model/x.py", "from brise.quant import config", "are relative"),
        ("kernels/x.py", "import numpy", "torch and triton only"),
    ],
)
def test_an_offence_is_found(tmp_path, monkeypatch, path, line, says):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line)
    (found,) = offences(file)
    assert says in found


@pytest.mark.parametrize(
    "path, line",
    [
        (
            "model/x.py",
            "from ..quant.config import QuantSpec\nfrom . import cache\nfrom transformers import Cache",
        ),
        ("eval/x.py", "def f():\n    import bitsandbytes"),
        ("quant/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import scipy"),
        ("quant/interop/x.py", "from ..config import QuantSpec"),
    ],
)
def test_what_is_allowed_is_no_offence(tmp_path, monkeypatch, path, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert list(offences(file)) == []


def run_python(code: str, **kwargs) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **kwargs)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_folder_kernels_does_not_shadow_the_package_that_transformers_looks_for():
    """transformers imports a package named ``kernels`` where there is one.

    With kernels/__init__.py and the root on sys.path (``python -m pytest``, a notebook there) ours would
    be taken for it, and the import of a model could fail.
    """
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import sys; sys.path.insert(0, ''); from transformers import MistralForCausalLM as M; print(M)"
    assert run_python(code, cwd=ROOT).strip().endswith("MistralForCausalLM'>")


def test_nothing_else_lies_where_it_would_be_imported_by_accident():
    assert list(ROOT.glob("*.py")) == [], "a script or conftest.py at the root puts the root on sys.path"
    assert list((ROOT / "tests").rglob("__init__.py")) == [], "pytest runs with --import-mode=importlib"
    assert [p for p in (ROOT / "tests").rglob("conftest.py") if p.parent != ROOT / "tests"] == []


IMPORT_ALL = """
import importlib, os, pkgutil, sys
import torch, transformers, transformers.models.mistral.modeling_mistral as mistral
watched = [torch, torch.nn, torch.nn.functional, torch.Tensor, torch.nn.Linear, mistral]
watched += [mistral.MistralForCausalLM]
before = [dict(vars(thing)) for thing in watched]
environment = dict(os.environ)
threads, dtype = torch.get_num_threads(), torch.get_default_dtype()

def guarded(query):
    def call(*args, **kwargs):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        assert not caller.startswith("brise."), f"{caller} asks {query.__name__} when it is imported"
        return query(*args, **kwargs)
    return call

queries = "is_available device_count current_device get_device_capability get_device_properties"
for name in queries.split():
    setattr(torch.cuda, name, guarded(getattr(torch.cuda, name)))
count = 0
for package in ("kernels", "quant", "model", "eval", "cli"):
    root = importlib.import_module(f"brise.{package}")
    for module in pkgutil.walk_packages(root.__path__, f"brise.{package}."):
        importlib.import_module(module.name)
        count += 1
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert not torch.cuda.is_initialized()
assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
for thing, old in zip(watched, before):
    changed = [k for k, v in old.items() if vars(thing).get(k) is not v]
    assert not changed, f"{thing.__name__} was patched: {changed}"
print(count)
"""


def test_an_import_changes_no_environment_patches_nothing_and_asks_for_no_device():
    modules = [p for p in sources() if p.name != "__init__.py" or p.parent.parent != ROOT]
    assert int(run_python(IMPORT_ALL, cwd=ROOT.parent)) == len(modules)


def test_every_folder_of_sources_is_a_package_that_the_wheel_contains():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"brise." + ".".join(p.relative_to(ROOT).parent.parts) for p in sources()}
    assert set(setup["packages"]) == folders
    assert setup["package-dir"] == {f: f.removeprefix("brise.").replace(".", "/") for f in folders}
    for layer in LAYERS:
        assert (ROOT / "tests/typings/brise" / layer).resolve() == ROOT / layer


def test_files_stay_small():
    files = [*sources(), *(ROOT / "tests").glob("**/test_*.py")]
    too_long = {name(p): n for p in files if (n := len(p.read_text().splitlines())) >= MOST_LINES}
    assert too_long == {}, f"a file has one concern and fewer than {MOST_LINES} lines"


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("git does not list this folder: it is no repository, or of another owner")
    return [ROOT / p for p in done.stdout.split("\0") if p and (ROOT / p).is_file()]


def test_no_file_names_a_path_of_somebodys_machine():
    machine = re.compile(r"(?<![\w.~<])/(work|home|root|Users|opt|tmp|mnt)/\w")
    found = []
    for path in tracked():
        if (
            path.suffix in (".md", ".jsonl", ".json", ".yaml", ".svg", ".txt", ".toml")
            or path.name == "Makefile"
        ):
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                if machine.search(line):
                    found.append(f"{name(path)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_every_skip_has_a_reason():
    missing = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called.endswith(("mark.skip", "mark.skipif", "mark.xfail")):
                reasons = [k for k in node.keywords if k.arg == "reason"]
            elif called == "pytest.skip":
                reasons = [*node.args, *node.keywords]
            else:
                continue
            if not reasons:
                missing.append(f"{name(path)}:{node.lineno}: {called}")
    assert missing == []


def test_nothing_is_left_to_do_in_the_sources():
    later = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    found = [
        f"{name(p)}:{i}"
        for p in sources()
        for i, s in enumerate(p.read_text().splitlines(), 1)
        if later.search(s)
    ]
    assert found == []


def test_the_test_environment_has_no_hub():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
