"""The documentation corpus: which text is prose, literals against Python's own parser, repeats, and the written files.

`tests/test_pipeline.py` looks at the corpus of this installation.
"""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import pytest

from maskllm.errors import MaskLLMError
from maskllm.quickstart import corpus
from maskllm.quickstart.prose import prose_blocks

NUMPYDOC = """
    Return the thing that is asked for, if there is
    one at all, and nothing otherwise.

    Parameters
    ----------
    x : array_like
        The input whose thing is wanted by the person who is calling.
    axis, out : int, optional
        Short.

    Examples
    --------
    >>> thing(3)
    This is output of the doctest and must not be taken for prose here.

    .. math::

        a = b + c and the words in this formula are not prose at all

    .. note::
        Notes are prose and belong to what the reader of this text sees.

    Call it as follows, which is shown by the next lines::

        result = thing(x) and then some words that are code all the same

    See :func:`~numpy.other_thing` or `the guide <https://example.org>`_ for *much* more about ``thing``.
"""

GOOGLE = """Runs the model once over everything that is in the queue.

```python
model = Model()  # some code in a fence that has many words in it
```

Args:
    input_ids (`torch.Tensor` of shape `(batch, length)`): Indices of the tokens in the vocabulary of the
        model, as made by the [`AutoTokenizer`] class.
    flag (bool): tiny.

- first item of a list with enough words to be called a sentence.
- second item of the same list with enough words as well.

| a table | with cells | and words | in all of its | cells here |

{placeholder} in a template that has enough words to be a sentence.
"""


def test_prose_of_numpydoc_and_restructuredtext():
    assert prose_blocks(NUMPYDOC) == [
        "Return the thing that is asked for, if there is one at all, and nothing otherwise.",
        "x: The input whose thing is wanted by the person who is calling.",
        "Notes are prose and belong to what the reader of this text sees.",
        "Call it as follows, which is shown by the next lines:",
        "See numpy.other_thing or the guide for much more about thing.",
    ]


def test_prose_of_google_style_and_markdown():
    assert prose_blocks(GOOGLE) == [
        "Runs the model once over everything that is in the queue.",
        "input_ids: Indices of the tokens in the vocabulary of the model, as made by the AutoTokenizer class.",
        "first item of a list with enough words to be called a sentence.",
        "second item of the same list with enough words as well.",
    ]


def test_long_literals_are_those_that_python_parses():
    compared = 0
    for module in ("argparse", "typing", "difflib", "doctest", "optparse", "dis", "turtle", "pydoc_data/topics"):
        source = (Path(ast.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(source)))
        constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
        documented = [node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        docstrings = {ast.get_docstring(node, clean=False) or "" for node in documented}
        found = list(corpus.long_literals(source))
        assert set(found) <= constants
        assert {text for text in docstrings if len(text) >= corpus.MIN_CHARACTERS} <= set(found)
        compared += len(found)
    assert compared > 100


def test_quotes_in_comments_and_strings_do_not_open_a_literal():
    long = "word " * 100
    source = (
        f"# it's a \"\"\" comment\na = 'q\\'\"\"\"' + \"'''\"\nb = r\"\"\"{long}\\d\"\"\"\nc = b'''{long}'''\nd = f'''{long}'''\n"
    )
    assert list(corpus.long_literals(source)) == [long + "\\d"]


def sentence(random: random.Random) -> str:
    return " ".join("".join(random.choices("abcdefghij", k=5)) for _ in range(15)) + "."


def test_repeats_and_near_repeats_are_dropped():
    generator = random.Random(0)
    first, second, third = ([sentence(generator) for _ in range(8)] for _ in range(3))
    renamed = first[0].split()
    renamed[3] = "othername"
    kept = list(corpus.deduplicated([first, [*second, first[2]], first, [" ".join(renamed), *third]]))
    assert kept == ["\n".join(first), "\n".join(second), "\n".join(third)]
    assert list(corpus.deduplicated([["Too short to be a document of its own."]])) == []


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A made-up installation: a standard library and a package that fails if it is imported."""
    library, package = tmp_path / "lib", tmp_path / "site" / "examplepackage"
    for directory in (library / "test", package):
        directory.mkdir(parents=True)
    for index in range(120):
        docstring = "\n\n".join(sentence(random.Random(10 * index + part)) for part in range(8))
        (library if index % 2 else package).joinpath(f"module{index}.py").write_text(f'"""{docstring}"""\n')
    (library / "test" / "skipped.py").write_text('"""' + "Text of a test that is never to be taken. " * 20 + '"""')
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(library))
    monkeypatch.setattr(corpus, "PACKAGES", ("examplepackage",))
    return tmp_path


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_corpus_is_reproducible_and_its_parts_are_disjoint(installation):
    first = corpus.write_documentation_corpus(installation / "first")
    second = corpus.write_documentation_corpus(installation / "second")
    assert first.train_file.read_bytes() == second.train_file.read_bytes()
    assert first.held_out_file.read_bytes() == second.held_out_file.read_bytes()
    train, held_out = read(first.train_file), read(first.held_out_file)
    assert (len(train), len(held_out)) == (first.train_documents, first.held_out_documents)
    assert 1 <= len(held_out) < len(train)
    assert not set(train) & set(held_out)
    assert not any("never to be taken" in text for text in train + held_out)
    assert min(map(len, train + held_out)) >= corpus.MIN_CHARACTERS
    assert sum(map(len, train + held_out)) == first.characters


def test_a_package_that_is_not_installed_is_named(installation, monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGES", ("no_such_package_here",))
    with pytest.raises(MaskLLMError, match="no_such_package_here is not installed"):
        corpus.write_documentation_corpus(installation / "out")
    assert not (installation / "out").exists()
