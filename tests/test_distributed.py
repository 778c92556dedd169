"""Ranks agree on a restart ID in a store with the keys of earlier starts; ranks raise errors together."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from maskllm.distributed import _agree_on_restart_id, raised_together
from maskllm.errors import MaskLLMError


def test_ranks_agree_on_a_new_id_at_each_restart():
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=20))
    ids = set()
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            ranks = [pool.submit(_agree_on_restart_id, store, rank, 4) for rank in (2, 3, 1, 0)]
            (agreed,) = {rank.result(timeout=30) for rank in ranks}
        ids.add(agreed)
    assert len(ids) == 3


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.5))
    store.set("asking/2", "left by an earlier start")
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(_agree_on_restart_id, store, rank, 3) for rank in (0, 1))
        with pytest.raises(MaskLLMError, match=r"ranks \[2\] did not come within"):
            first.result(timeout=30)
        second.result(timeout=30)


def test_a_single_process_raises_its_error_unchanged():
    with pytest.raises(MaskLLMError, match="one line"), raised_together():
        raise MaskLLMError("one line")
    with raised_together():
        pass
