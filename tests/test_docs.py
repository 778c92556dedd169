"""Documentation and comments name files, modules and symbols that exist; the tests' real data files are in CONTRIBUTING.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import real_data

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "maskllm", "megatron_patches", "tests", "tools")
FILES = [*ROOT.glob("*.*"), ROOT / "Makefile", ROOT / "Dockerfile"]
FILES += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
NAMES = {"llama.cpp"} | {path.name for path in FILES}  # llama.cpp is a program
PAGES = sorted(str(path.relative_to(ROOT)) for path in FILES if path.suffix == ".md")
SOURCES = sorted(path for path in FILES if path.suffix in (".py", ".sh", ".sbatch", ".h", ".cpp", ".cu", ".inl", ".toml", ".yaml"))

ENDINGS = r"\.(?:py|sh|sbatch|md|cpp|cu|h|inl|toml)\b"
PATH = rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/"
SYMBOL = r"(?:maskllm|megatron_patches)(?:\.\w+)+"


def code(text: str) -> str:
    """The code spans and code blocks of a Markdown page, one a line."""
    fence = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks, text = fence.findall(text), fence.sub("", text)
    return "\n".join([*blocks, *re.findall(r"^ {4}.*", text, re.MULTILINE), *re.findall(r"`([^`\n]+)`", text)])


def path_exists(name: str) -> bool:
    """Whether the repository has this path. A word in capitals stands for any name, and `*` for any characters."""
    return any(ROOT.glob(re.sub(r"\b[A-Z]{3,}\b(?!\.md)", "*", name)))


def symbol_exists(name: str) -> bool:
    """Whether a dotted name is a module, or begins with one whose source has the next part of the name."""
    parts, path = name.split("."), ROOT
    while parts and ((path / parts[0]).is_dir() or (path / f"{parts[0]}.py").is_file()):
        path /= parts.pop(0)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (
        not parts
        or name == "maskllm.json"  # a file of a checkpoint
        or name in (ROOT / "setup.py").read_text(encoding="utf-8")  # an extension module
        or bool(re.search(rf"\b{parts[0]}\b", source.read_text(encoding="utf-8")))
    )


def missing_from_page(page: str, text: str) -> list[str]:
    """What a Markdown page names and the repository does not have: link targets, and in code paths, source files and symbols."""
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    words = code(text)
    paths = set(re.findall(rf"{PATH}[\w.*/-]*[\w*/]", words))
    files = set(re.findall(rf"(?<![\w./$-])[\w.*/-]+{ENDINGS}", words)) - paths
    return [
        *(target for target in links if not ((ROOT / page).parent / target).exists()),
        *(path for path in paths if not path_exists(path)),
        *(file for file in files if not path_exists(file) and Path(file).name not in NAMES),
        *(name for name in re.findall(rf"(?<![\w./-]){SYMBOL}", words) if not symbol_exists(name)),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    assert missing_from_page(page, (ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "[the page](gone.md)",
        "`maskllm/gone/spec.py`",
        "`tests/gone/`",
        "`examples/gone/RECIPE.sh`",
        "`gone.py`",
        "    python benchmarks/gone.py --json F",
        "```bash\nexamples/gone.sh llama2-7b\n```",
        "`maskllm.gone.spec`",
        "`maskllm.ops.no_such_operator`",
    ],
)
def test_what_does_not_exist_is_found(text):
    assert missing_from_page("docs/a_page.md", text) != []


def test_what_comments_name_exists():
    missing = []
    for source in set(SOURCES) - {Path(__file__)}:
        text = source.read_text(encoding="utf-8")
        missing += [(source.name, path) for path in re.findall(rf"{PATH}[\w.*/-]+{ENDINGS}", text) if not path_exists(path)]
        missing += [(source.name, name) for name in re.findall(f"`({SYMBOL})", text) if not symbol_exists(name)]
    assert missing == []


def test_the_data_files_that_tests_read_are_listed():
    used = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r'real_data\("([^"]+)"\)', path.read_text())
    }
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert used
    assert [name for name in used if f"| `{name}` |" not in contributing] == []


def test_a_missing_data_file_skips_only_without_the_variable(tmp_path, monkeypatch):
    folder, name = tmp_path / "elsewhere", "text.txt"
    monkeypatch.setattr("tests.conftest.TEST_DATA_BESIDE_CHECKOUT", tmp_path)
    monkeypatch.delenv("MASKLLM_TEST_DATA", raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"{name}.*MASKLLM_TEST_DATA"):
        real_data(name)
    monkeypatch.setenv("MASKLLM_TEST_DATA", str(folder))
    with pytest.raises(pytest.fail.Exception, match=f"MASKLLM_TEST_DATA={folder}.*{name}"):
        real_data(name)
    folder.mkdir()
    (folder / name).touch()
    assert real_data(name) == folder / name
