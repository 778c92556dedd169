"""The parts of the 2:4 products that need no GPU: the algorithm cache, and what is refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import Sparse24Linear
from maskllm.ops.sparse24 import AlgorithmCache, algorithm_key, token_bucket


def test_the_cache_keeps_entries_that_another_process_wrote(tmp_path):
    path = tmp_path / "folder" / "cusparselt.json"
    first, second = AlgorithmCache(path), AlgorithmCache(path)
    assert first.get("a") == []
    first.put("a", [1, 2, 3, 4])
    second.put("b", [5, 6, 7, 8])
    third = AlgorithmCache(path)
    assert (third.get("a"), third.get("b")) == ([1, 2, 3, 4], [5, 6, 7, 8])


def test_the_cache_keeps_the_entries_of_many_writers(tmp_path):
    path = tmp_path / "cusparselt.json"

    def fill(writer: int) -> None:
        cache = AlgorithmCache(path)
        for entry in range(20):
            cache.put(f"{writer}/{entry}", [writer, entry, 0, 0])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    cache = AlgorithmCache(path)
    assert all(cache.get(f"{writer}/{entry}") == [writer, entry, 0, 0] for writer in range(4) for entry in range(20))


@pytest.mark.parametrize("content", ["{", '{"key": [1, 2]}', "[1]", '{"key": ["a", 1, 2, 3]}'])
def test_a_damaged_cache_file_is_named(tmp_path, content):
    path = tmp_path / "cusparselt.json"
    path.write_text(content)
    with pytest.raises(MaskLLMError, match=r"cusparselt\.json: .*delete"):
        AlgorithmCache(path)


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKLLM_CACHE_DIR", str(tmp_path))
    assert AlgorithmCache().path == tmp_path / "cusparselt.json"


def test_keys_differ_in_everything_the_choice_depends_on():
    base = (4096, 11008, 8, torch.float16, False, "", "GPU", 8001)
    changed = (4097, 11009, 16, torch.bfloat16, True, "relu", "other", 8002)
    keys = {algorithm_key(*base)} | {algorithm_key(*base[:i], changed[i], *base[i + 1 :]) for i in range(len(base))}
    assert len(keys) == len(base) + 1


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 8), (8, 8), (9, 16), (16, 16), (1000, 1024), (8192, 8192)])
def test_buckets_are_powers_of_two(tokens, bucket):
    assert token_bucket(tokens, 8) == bucket


def test_a_weight_on_the_cpu_is_refused():
    with pytest.raises(MaskLLMError, match="fc1: on cpu; 2:4 products need an NVIDIA GPU"):
        Sparse24Linear(torch.zeros(16, 16), name="fc1")
