"""Tasks from local JSON lines: their checks, and the configurations with which lm-eval reads them.

The file of a task is NAME.jsonl in the folder of `--tasks-data`. It is of one of three forms:

* the fields of the task's own data set on the hub: lm-eval's configuration is used as it is, but for the place of the data;
* `query`, `choices`, `gold`: choices are compared as continuations of the query. If every query begins with "Question:", the prompt
  ends with a line "Answer:", as in lm-eval's PIQA and ARC;
* `context_options`, `continuation`, `gold`: one continuation is compared after several contexts, as in lm-eval's WinoGrande.

`gold` is the index of the right choice, from 0. NAME.SPLIT.jsonl holds the examples of prompts with examples; SPLIT is the one that the
configuration takes them from ("train", "dev", ...).
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskllm.data.json_lines import json_object
from maskllm.data.text_files import check_inputs, read_lines
from maskllm.errors import MaskLLMError

_CHOICES = ("query", "choices", "gold")
_CONTEXTS = ("context_options", "continuation", "gold")
_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True)
class TaskFile:
    """A file that was evaluated."""

    path: str
    rows: int
    sha256: str
    """Of the file's bytes."""
    form: str
    """"lm-eval", or the names of the fields."""


def find_task_file(folder: Path, task: str, split: str | None = None) -> Path | None:
    """The file of a task in `folder`, or of one of its other splits; None if there is none.

    Names are compared without case, `_` and `-`: openbook_qa.jsonl serves the task openbookqa.
    """
    wanted = _plain(f"{task}.{split}" if split else task)
    return next((path for path in sorted(folder.glob("*.jsonl")) if _plain(path.name.removesuffix(".jsonl")) == wanted), None)


def _plain(name: str) -> str:
    return re.sub("[_-]", "", name).lower()


def describes_itself(folder: Path, task: str) -> bool:
    """Whether `folder` has the task's file, and this is empty or has one of the forms that need no configuration of lm-eval."""
    path = find_task_file(folder, task)
    if path is None:
        return False
    first = next(_rows(path), None)
    return first is None or any(first[1].keys() >= set(fields) for fields in (_CHOICES, _CONTEXTS))


def local_config(
    folder: Path, task: str, original: Mapping[str, Any] | None, source: Path | None, shots: int | None
) -> tuple[dict[str, Any], TaskFile]:
    """lm-eval's configuration of a task whose data are in `folder`, and the file that is evaluated.

    Args:
        original: lm-eval's own configuration, with its includes read but its functions not loaded; None if it has no such task.
        source: the file of `original`, which the result includes.
        shots: examples in the prompt; None for what the configuration says.

    Raises MaskLLMError if a file is missing, empty or malformed, with the line.
    """
    path = find_task_file(folder, task)
    if path is None:
        raise MaskLLMError(
            f"--tasks-data {folder}: has no {task}.jsonl for the task {task}; wanted JSON lines with {_wanted(original)}"
        )
    first = next(_rows(path), None)
    if first is None:
        raise MaskLLMError(f"{path}: is empty; wanted JSON lines with {_wanted(original)}")
    keys = set(first[1])
    # AGIEval's rows have the same names, and lists of right answers.
    of_hub = original is not None and isinstance(first[1].get("gold"), list) and set(_fields(original)) >= set(_CHOICES)
    if keys >= set(_CHOICES) and not of_hub:
        form, fields, check = ", ".join(_CHOICES), _CHOICES, _check_choices
    elif keys >= set(_CONTEXTS):
        form, fields, check = ", ".join(_CONTEXTS), _CONTEXTS, _check_contexts
    elif original is not None:
        form, fields, check = "lm-eval", _fields(original), None
    else:
        raise MaskLLMError(f"{path}:{first[0]}: has the fields {', '.join(sorted(keys)) or 'none'}; wanted {_wanted(None)}")
    rows = asks = 0
    for number, row in _rows(path):
        if missing := [name for name in fields if name not in row]:
            raise MaskLLMError(f"{path}:{number}: has no {missing[0]!r}; wanted {', '.join(fields)} in every line")
        if check is not None and (problem := check(row)):
            raise MaskLLMError(f"{path}:{number}: {problem}")
        rows += 1
        asks += str(row.get("query", "")).startswith("Question:")
    found = TaskFile(str(path), rows, hashlib.sha256(path.read_bytes()).hexdigest(), form)
    if form == "lm-eval":
        return _of_lm_eval(folder, task, path, original, source, shots), found
    files = {"test": path}
    if examples := find_task_file(folder, task, "train"):
        files["train"] = examples
    config = {
        "task": task,
        "output_type": "multiple_choice",
        "test_split": "test",
        "metadata": {"version": 1.0},
        **_data(files),
        **({"training_split": "train", "fewshot_split": "train"} if examples else {}),
    }
    if check is _check_choices:
        question = "{{query.rstrip()}}\nAnswer:" if asks == rows else "query"
        config |= {"doc_to_text": question, "doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": _METRICS}
    else:
        config |= {
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
            "metric_list": _METRICS[:1],
        }
    if shots and not examples:
        raise MaskLLMError(
            f"--tasks-data {folder}: has no {task}.train.jsonl, which the {shots} examples in each prompt of {task} come from"
        )
    return config, found


def _of_lm_eval(
    folder: Path, task: str, path: Path, original: Mapping[str, Any], source: Path, shots: int | None
) -> dict[str, Any]:
    """lm-eval's own configuration with the data of `folder`. Splits without a file are left out."""
    evaluated = original.get("test_split") or original.get("validation_split")
    files = {evaluated: path}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = original.get(key)
        if split and split not in files and (other := find_task_file(folder, task, split)):
            files[split] = other
    splits = {
        key: original[key] if original.get(key) in files else None
        for key in ("training_split", "validation_split", "test_split", "fewshot_split")
    }
    shots = original.get("num_fewshot") if shots is None else shots
    examples = original.get("fewshot_split") or original.get("training_split")
    if shots and examples and examples not in files:
        raise MaskLLMError(
            f"--tasks-data {folder}: has no {task}.{examples}.jsonl, which the {shots} examples in each prompt of {task} come from"
        )
    # Without tags, the task stays in the groups and tags in which lm-eval has it.
    return {"include": str(source), "task": task, "tag": [], **splits, **_data(files)}


def _data(files: Mapping[str, Path]) -> dict[str, Any]:
    paths = {split: glob.escape(str(path.resolve())) for split, path in files.items()}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": paths}}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line in read_lines(check_inputs([path])):
        yield line.number, json_object(line)


def _wanted(original: Mapping[str, Any] | None) -> str:
    """The forms that a task's file may have, in words."""
    forms = f"{', '.join(_CHOICES)} or {', '.join(_CONTEXTS)}"
    if original is None:
        return forms
    fields = ", ".join(_fields(original))
    return f"the rows of the data set {data_set(original)}{f' ({fields})' if fields else ''}, or with {forms}"


def data_set(config: Mapping[str, Any]) -> str:
    """The hub's name of a configuration's data set, and the split that is evaluated."""
    name = " ".join(str(part) for part in (config.get("dataset_path"), config.get("dataset_name")) if part)
    return f"{name}, split {config.get('test_split') or config.get('validation_split')}"


def _fields(config: Mapping[str, Any]) -> list[str]:
    """The fields of a data set that the templates of a configuration name; none if its functions make the fields."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    if config.get("process_docs") is not None:
        return []
    found: list[str] = []
    for text in (config.get(key) for key in ("doc_to_text", "doc_to_choice", "doc_to_target")):
        if not isinstance(text, str) or "/" in text.partition("{")[0]:  # a function has its module's path
            continue
        if text.isidentifier():
            found.append(text)
            continue
        try:
            found += sorted(meta.find_undeclared_variables(Environment().parse(text)))
        except TemplateSyntaxError:  # lm-eval reports it
            continue
    return list(dict.fromkeys(found))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_options(row: Mapping[str, Any], key: str) -> str | None:
    options, gold = row[key], row["gold"]
    if not (isinstance(options, list) and len(options) >= 2 and all(map(_is_text, options))):
        return f"{key!r} is {json.dumps(options)[:60]}; wanted a list of two or more strings that are not empty"
    if type(gold) is not int or not 0 <= gold < len(options):
        return f"'gold' is {json.dumps(gold)[:60]}; wanted the index of one of {len(options)} {key}, from 0"
    return None


def _check_choices(row: Mapping[str, Any]) -> str | None:
    if not isinstance(row["query"], str):
        return f"'query' is {json.dumps(row['query'])[:60]}; wanted a string"
    return _check_options(row, "choices")


def _check_contexts(row: Mapping[str, Any]) -> str | None:
    if not _is_text(row["continuation"]):
        return f"'continuation' is {json.dumps(row['continuation'])[:60]}; wanted a string that is not empty"
    return _check_options(row, "context_options")
