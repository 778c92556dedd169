"""The sets of zero-shot tasks that the pruning papers report, by lm-eval's names of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MASKLLM7 = ("hellaswag", "race", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_WANDA7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class TaskSet:
    """Tasks or groups of lm-eval whose mean is reported."""

    name: str
    members: tuple[str, ...]
    shots: int | None = None
    """Examples in the prompt; None for what lm-eval's configuration of each task says, which is 0 if it says nothing."""


NAMED = {
    found.name: found
    for found in (
        TaskSet("maskllm7", _MASKLLM7),
        TaskSet("wanda7", _WANDA7),
        TaskSet("all9", (*_WANDA7[:2], *_MASKLLM7)),
        TaskSet("mmlu_5shot", ("mmlu",), shots=5),
    )
}
"""The tables of MaskLLM (arXiv 2409.17481) and of Wanda (arXiv 2306.11695), the union of their tasks, and MMLU."""

FOLDERS = {
    "boolq": "super_glue/boolq",
    "rte": "glue/rte",
    "hellaswag": "hellaswag",
    "race": "race",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "mmlu": "mmlu/default",
}
"""Where lm-eval keeps the configurations of the sets' members. Reading all 14,000 others takes 10 seconds or more."""


def expand(names: Sequence[str]) -> list[TaskSet]:
    """The sets that a command line asks for. The names that are not sets are one set together. A name counts once."""
    loose = tuple(dict.fromkeys(name for name in names if name not in NAMED))
    sets = [NAMED[name] for name in dict.fromkeys(names) if name in NAMED]
    return [*([TaskSet(loose[0] if len(loose) == 1 else f"{len(loose)} tasks", loose)] if loose else []), *sets]
