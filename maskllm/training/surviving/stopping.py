"""Why a run stops before its last step: a signal on any rank, or a dataset file that disappears from any machine."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from maskllm.distributed import any_rank, raised_together
from maskllm.errors import MaskLLMError, StoppedError
from maskllm.training.data import DataFiles


class Stopping:
    """Whether the run is to stop, as all ranks know it.

    SIGTERM, SIGINT and SIGHUP only set a flag. The ranks exchange their flags once a step, so that all of them stop after the same step,
    save, and end with exit status 75.
    """

    def __init__(self, prefixes: list[str]) -> None:
        """`prefixes` of the datasets that are watched. One rank of each machine looks after the files, to spare the file system."""
        self._files = DataFiles(prefixes if os.environ.get("LOCAL_RANK", "0") == "0" else [])
        self._signal: int | None = None
        self._data_problem: str | None = None
        self._signalled_anywhere = False
        self._data_gone_anywhere = False

    def catch_signals(self) -> None:
        """From now on SIGTERM, SIGINT and SIGHUP stop the run after the step. Under nohup SIGHUP stays ignored."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _: Any) -> None:
        self._signal = number

    @property
    def requested(self) -> bool:
        """Whether all ranks stop after this step, with a checkpoint and without anything that takes long."""
        return self._signalled_anywhere or self._data_gone_anywhere

    def agree_after_step(self, iteration: int, *, skip: bool) -> bool:
        """Exchange the ranks' flags after step `iteration`, counted from 0; returns whether any rank wants to `skip` its update."""
        self._data_problem = self._files.problem()
        if self._data_problem is not None:
            print(f"iteration {iteration + 1}: {self._data_problem}", file=sys.stderr, flush=True)
        skipped, self._signalled_anywhere, self._data_gone_anywhere = any_rank(
            skip, self._signal is not None, self._data_problem is not None
        )
        return skipped

    def agree_on_signals(self) -> bool:
        """Exchange with all ranks whether any of them has received a signal, during something that takes long."""
        (self._signalled_anywhere,) = any_rank(self._signal is not None)
        return self._signalled_anywhere

    def end(self, iteration: int, state: str) -> None:
        """Raise MaskLLMError about the data that are gone, else StoppedError. `state` says what has been saved after `iteration` steps."""
        if self._data_gone_anywhere:
            with raised_together():
                if self._data_problem is not None:
                    raise MaskLLMError(f"{self._data_problem}; {state}")
        raise StoppedError(f"stopped by a signal after iteration {iteration}; {state}")
