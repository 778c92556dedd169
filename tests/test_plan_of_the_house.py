"""The rooms import each other only as docs/architecture.md says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # import-linter brings it to Python 3.10

ROOT = Path(__file__).parents[1]


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(folder / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_rooms_import_downwards():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


def test_every_room_is_in_the_plan():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    planned = {name.strip() for layer in layers for name in layer.split("|")}
    entries = [path for path in (ROOT / "maskllm").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert planned == {f"maskllm.{path.stem}" for path in entries if path.name != "__init__.py"} | {"megatron_patches"}


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("masking/sampler.py", "import maskllm.training.loop"),
        ("masking/sampler.py", "import megatron.core"),
        ("families/llama.py", "from transformers import AutoConfig"),
        ("huggingface/blocks.py", "import maskllm.megatron.loss"),
        ("training/loop.py", "import maskllm.cli.options"),
    ],
)
def test_an_import_against_the_plan_is_found(room, line, tmp_path):
    for name in ("maskllm", "megatron_patches"):
        for source in (ROOT / name).rglob("*.py"):
            copy = tmp_path / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    file = tmp_path / "maskllm" / room
    file.write_text(f"{file.read_text()}\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout
