"""The layers of the project: which package may import which, and what an import may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each unit and the units it may import.
ARROWS: dict[str, set[str]] = {
    "ttaq_kernels": set(),
    "ttaq.version": set(),
    "ttaq.errors": {"ttaq_kernels"},
    "ttaq.scheme": {"ttaq.errors"},
    "ttaq.models": {"ttaq.errors"},
    "ttaq.data": {"ttaq.errors"},
    "ttaq.nn": {"ttaq.errors", "ttaq.scheme", "ttaq_kernels"},
    "ttaq.io": {"ttaq.version", "ttaq.errors", "ttaq.scheme", "ttaq.nn", "ttaq.models"},
    "ttaq.convert_foreign": {"ttaq.errors", "ttaq.io", "ttaq.models"},
    "ttaq.ptq": {"ttaq.errors", "ttaq.scheme", "ttaq.data", "ttaq.nn", "ttaq.io", "ttaq_kernels"},
    "ttaq.tta": {"ttaq.errors", "ttaq.data", "ttaq.nn", "ttaq_kernels"},
    "ttaq.eval": {
        "ttaq.version",
        "ttaq.errors",
        "ttaq.scheme",
        "ttaq.nn",
        "ttaq.io",
        "ttaq.models",
        "ttaq.data",
        "ttaq.ptq",
        "ttaq.tta",
    },
    "ttaq.cli": {
        "ttaq",
        "ttaq_kernels",
        "ttaq.version",
        "ttaq.errors",
        "ttaq.scheme",
        "ttaq.nn",
        "ttaq.io",
        "ttaq.models",
        "ttaq.data",
        "ttaq.ptq",
        "ttaq.tta",
        "ttaq.eval",
        "ttaq.convert_foreign",
    },
    "ttaq.__main__": {"ttaq.cli"},
    "ttaq": {"ttaq.version", "ttaq.errors", "ttaq.scheme", "ttaq.nn", "ttaq.io", "ttaq.ptq", "ttaq.tta"},
}
OPTIONAL = {"matplotlib", "sklearn", "tqdm", "timm", "torchvision", "PIL", "scipy", "pytest"}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(name: str) -> str | None:
    """The layer a dotted module name belongs to; None for other projects' modules."""
    parts = name.split(".")
    if parts[0] == "ttaq_kernels":
        return "ttaq_kernels"
    if parts[0] == "ttaq":
        return ".".join(parts[:2]) if len(parts) > 1 and ".".join(parts[:2]) in ARROWS else "ttaq"
    return None


def imports_of(path: Path) -> list[tuple[int, str, bool]]:
    """(line, imported module, at module level) of every import statement, names imported from a package resolved."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Module) for node in node.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                is_module = (ROOT / Path(*full.split("."))).with_suffix(".py").exists() or (
                    ROOT / Path(*full.split("."))
                ).is_dir()
                found.append((node.lineno, full if is_module else base, id(node) in top))
    return found


SOURCES = sorted([*ROOT.glob("ttaq/**/*.py"), *ROOT.glob("ttaq_kernels/**/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    unit = unit_of(module_name(path))
    assert unit is not None
    for line, name, top_level in imports_of(path):
        target = unit_of(name)
        if target is not None and target != unit:
            assert target in ARROWS[unit], (
                f"{path.relative_to(ROOT)}:{line} imports {name}: {unit} may not import {target}"
            )
        if name.split(".")[0] in OPTIONAL:
            assert not top_level, f"{path.relative_to(ROOT)}:{line}: {name} is optional, import it where it is used"


def test_arrows_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = [unit for unit, needs in ARROWS.items() if unit not in done and needs <= done]
        assert ready, f"cycle among {sorted(set(ARROWS) - done)}"
        done.update(ready)


@pytest.mark.parametrize("package", ["ttaq_kernels", "ttaq"])
def test_import_is_quick_and_starts_nothing(package: str) -> None:
    probe = f"""
import logging, random, sys, time
import torch
handlers, modules = list(logging.getLogger().handlers), set(sys.modules)
random_state, torch_state = random.getstate(), torch.get_rng_state()
start = time.process_time()
import {package}
seconds = time.process_time() - start
assert not torch.cuda.is_initialized(), "importing started a CUDA context"
assert random.getstate() == random_state, "importing drew random numbers"
assert torch.equal(torch.get_rng_state(), torch_state), "importing drew random numbers"
assert logging.getLogger().handlers == handlers, "importing configured logging"
optional = {{'matplotlib', 'sklearn', 'tqdm', 'PIL', 'scipy'}} & (set(sys.modules) - modules)
assert not optional, f"importing loaded {{optional}}"
print(seconds)
"""
    # The quickest of three: the first one may compile byte code.
    seconds = min(
        float(subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )
    assert seconds < 1.0, f"import {package} takes {seconds:.2f} s of CPU beyond torch's own import"


@pytest.mark.parametrize("package", ["ttaq_kernels", "ttaq"])
def test_packages_import_without_triton(package: str) -> None:
    probe = f"""
import sys
sys.modules['triton'] = None
import torch, {package}
from ttaq_kernels import softmax_entropy
print(softmax_entropy(torch.zeros(1, 2)).item())
"""
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert abs(float(result.stdout) - 0.6931472) < 1e-6


def test_public_names_are_few_and_exist() -> None:
    import importlib

    for package in ("ttaq", "ttaq_kernels", "ttaq.nn", "ttaq.ptq", "ttaq.tta", "ttaq.data", "ttaq.models", "ttaq.eval"):
        module = importlib.import_module(package)
        most = 30 if package == "ttaq_kernels" else 20  # an op is a name
        assert len(module.__all__) <= most, f"{package} has {len(module.__all__)} public names"
        for name in module.__all__:
            assert hasattr(module, name), f"{package}.__all__ names {name}, which does not exist"
