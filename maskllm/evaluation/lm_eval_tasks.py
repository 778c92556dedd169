"""lm-eval's tasks by name: from the hub, or with local data."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager

from maskllm.errors import MaskLLMError, whole_message
from maskllm.evaluation.task_files import TaskFile, data_set, describes_itself, find_task_file, local_config
from maskllm.evaluation.task_sets import FOLDERS, NAMED, TaskSet

_LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"


@dataclass(frozen=True)
class Row:
    """A line of the result: a task, a group of lm-eval, or the mean of a set."""

    name: str
    kind: str
    """"task", "group" or "mean"."""
    weights: dict[str, float]
    """Task -> its weight in this line's value; they sum to 1. In a group like MMLU it is the task's share of the items."""
    members: tuple[str, ...] = ()
    """The lines that a mean is of."""


@dataclass(frozen=True)
class Suite:
    """The tasks of a call."""

    loaded: dict[str, Any]
    """What `TaskManager.load` returns: tasks, groups and which group has which."""
    rows: tuple[Row, ...]
    files: dict[str, TaskFile]
    """Task -> the local file with its items."""


def load_suite(sets: Sequence[TaskSet], data: Path | None, limit: int | None, scratch: Path) -> Suite:
    """Load the tasks of the sets.

    Args:
        data: the folder with local files; None to take the data from the hub or its cache.
        limit: evaluate the first `limit` items of each task; None for all.
        scratch: an existing folder to write the configurations of local tasks to.

    Some tasks shuffle their answers by the global generators, which are seeded as lm-eval's own command seeds them.

    Raises MaskLLMError if a name is unknown (with the closest names), if its data cannot be had, if a local file is missing or
    malformed, if a task is asked for twice or with two numbers of examples, and if it needs images or runs code of the model's.
    """
    if data is not None and not data.is_dir():
        raise MaskLLMError(f"--tasks-data {data}: no such folder")
    members = list(dict.fromkeys(name for found in sets for name in found.members))
    shots = _shots(sets)
    manager = _manager(members, data, None)
    files: dict[str, TaskFile] = {}
    if data is not None:
        for name in members:
            for leaf in _leaves(manager, name) if name in manager.task_index else [name]:
                entry = manager.task_index.get(leaf)
                if entry is None and find_task_file(data, leaf) is None:
                    raise _unknown(manager, leaf, data)
                if entry is not None and entry.kind.name != "TASK":
                    raise MaskLLMError(
                        f"--tasks {leaf}: lm-eval builds it with Python code, which takes no local data; leave out --tasks-data"
                    )
                original, source = (None, None) if entry is None else (entry.cfg, entry.yaml_path)
                config, files[leaf] = local_config(data, leaf, original, source, shots.get(name))
                (scratch / f"{leaf}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        manager = _manager(members, data, scratch)
    for name in members:
        if name not in manager.task_index:
            raise _unknown(manager, name, data)
    _check_once(manager, members)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    with quiet():
        loaded = _load(manager, members)
        _check_runs(loaded)
        rows = _rows(sets, manager, loaded, limit)
        for name, count in shots.items():
            for task in _leaves(manager, name):
                loaded["tasks"][task].set_config(key="num_fewshot", value=count)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    return Suite(loaded, rows, files)


def seed_examples(suite: Suite) -> None:
    """Let each task draw the examples of its prompts anew, as lm-eval does for every model."""
    for task in suite.loaded["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block in which lm-eval logs errors only: its warnings are about every prompt, or about what this package reports itself."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shots(sets: Sequence[TaskSet]) -> dict[str, int]:
    """Member -> examples in its prompts, for the members of sets that state them."""
    stated: dict[str, int | None] = {}
    for found in sets:
        for name in found.members:
            if stated.setdefault(name, found.shots) != found.shots:
                raise MaskLLMError(
                    f"--tasks {found.name}: asks for {name} with another number of examples than --tasks {name}; use two calls"
                )
    return {name: count for name, count in stated.items() if count is not None}


def _manager(members: Sequence[str], data: Path | None, scratch: Path | None) -> TaskManager:
    """An index of the members' configurations: of all of lm-eval's if one needs a configuration of lm-eval that is not well known."""
    known = [name for name in members if name in FOLDERS]
    rest = [name for name in members if name not in FOLDERS and not (data is not None and describes_itself(data, name))]
    folders = [_LM_EVAL_TASKS / FOLDERS[name] for name in known]
    with quiet():
        return TaskManager(include_defaults=bool(rest), include_path=[*dict.fromkeys(folders), *([scratch] if scratch else [])])


def _leaves(manager: TaskManager, name: str) -> list[str]:
    """The tasks of a task, a group or a tag."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name in ("TASK", "PY_TASK"):
        return [name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    children = [item if isinstance(item, str) else item.get("task") or item.get("group") for item in entry.cfg.get("task") or []]
    return list(dict.fromkeys(leaf for child in children for leaf in _leaves(manager, child)))


def _unknown(manager: TaskManager, name: str, data: Path | None) -> MaskLLMError:
    local = [path.name.removesuffix(".jsonl") for path in data.glob("*.jsonl")] if data is not None else []
    known = dict.fromkeys([*NAMED, *local, *manager.all_tasks])
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    nor = f", nor has {data} the file {name}.jsonl" if data else ""
    return MaskLLMError(
        f"--tasks {name}: lm-eval {lm_eval.__version__} has no such task{nor}; "
        f"the closest names are {', '.join(close) or 'none'}; `lm-eval ls tasks` prints all"
    )


def _check_once(manager: TaskManager, members: Sequence[str]) -> None:
    """Raise MaskLLMError if two of the names have a task in common."""
    owners: dict[str, str] = {}
    for name in members:
        for leaf in _leaves(manager, name):
            if (owner := owners.setdefault(leaf, name)) != name:
                raise MaskLLMError(f"--tasks {owner} {name}: both have the task {leaf}; use two calls, or leave one out")


def _check_runs(loaded: dict[str, Any]) -> None:
    """Raise MaskLLMError for a task that a text model, or this package, does not run."""
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise MaskLLMError(f"--tasks {name}: runs code that the model writes; only lm-eval's own command can be told to do so")
        if getattr(task, "MULTIMODAL", False):
            raise MaskLLMError(f"--tasks {name}: has images or sound; wanted a task of text alone")


def _load(manager: TaskManager, members: Sequence[str]) -> dict[str, Any]:
    try:
        return manager.load(list(members))
    except Exception as error:  # libraries for data sets, the hub's client and tasks' own code raise many types
        leaves = [leaf for name in members for leaf in _leaves(manager, name)]
        wanted = [
            f"{leaf}.jsonl ({data_set(entry.cfg)})" for leaf in leaves if (entry := manager.task_index.get(leaf)) and entry.cfg
        ]
        more = f" and {len(wanted) - 3} more" if len(wanted) > 3 else ""
        raise MaskLLMError(
            f"--tasks {' '.join(members)}: lm-eval cannot load a task: {whole_message(error)}; without a network, put the data as "
            f"JSON lines into a folder, {', '.join(wanted[:3])}{more}, and name it with --tasks-data"
        ) from error


def _rows(sets: Sequence[TaskSet], manager: TaskManager, loaded: dict[str, Any], limit: int | None) -> tuple[Row, ...]:
    rows: dict[str, Row] = {}
    for found in sets:
        names = []
        for name in found.members:
            group = loaded["groups"].get(name)
            if group is not None and group.has_aggregation:
                rows[name] = _group_row(group, limit)
                names.append(name)
                continue
            for leaf in _leaves(manager, name):
                rows[leaf] = Row(leaf, "task", {leaf: 1.0})
                names.append(leaf)
        if len(names) > 1:
            weights: dict[str, float] = {}
            for name in names:
                for leaf, weight in rows[name].weights.items():
                    weights[leaf] = weights.get(leaf, 0.0) + weight / len(names)
            rows[f"mean of {found.name}"] = Row(f"mean of {found.name}", "mean", weights, tuple(names))
    return tuple(sorted(rows.values(), key=lambda row: row.kind == "mean"))


def _group_row(group: Group, limit: int | None) -> Row:
    tasks = group.get_all_tasks()
    by_size = any(metric.metric == "acc" and metric.weight_by_size for metric in group.aggregate_metric_list)
    sizes = {task.task_name: min(len(task.eval_docs), limit or sys.maxsize) if by_size else 1 for task in tasks}
    return Row(group.name, "group", {name: size / sum(sizes.values()) for name, size in sizes.items()})
