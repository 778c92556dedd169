"""The cache of cuSPARSELt's algorithms."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import algorithm_cache
from maskllm.ops.algorithm_cache import AlgorithmCache, algorithm_key, token_bucket


def test_the_cache_keeps_entries_that_another_process_wrote(tmp_path):
    path = tmp_path / "folder" / "cusparselt.json"
    first, second = AlgorithmCache(path), AlgorithmCache(path)
    assert first.get("a") is None
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


def test_a_dropped_entry_leaves_the_file_and_stays_away(tmp_path):
    path = tmp_path / "cusparselt.json"
    AlgorithmCache(path).put("bad", [99, 1, 0, 0])
    first, second = AlgorithmCache(path), AlgorithmCache(path)
    first.drop("bad")
    assert first.get("bad") is AlgorithmCache(path).get("bad") is None
    second.put("other", [1, 1, 0, 0])  # this one still had the bad entry in memory
    assert AlgorithmCache(path).get("bad") is None
    assert AlgorithmCache(path).get("other") == [1, 1, 0, 0]


def test_an_entry_of_a_file_that_cannot_be_written_is_dropped_for_the_process(tmp_path, monkeypatch):
    path = tmp_path / "cusparselt.json"
    AlgorithmCache(path).put("bad", [99, 1, 0, 0])
    cache = AlgorithmCache(path)

    def refuse(*_args):
        raise PermissionError("read-only")

    monkeypatch.setattr(algorithm_cache, "write_json", refuse)
    with pytest.warns(RuntimeWarning, match=r"cusparselt\.json: cannot be read or written \(read-only\)"):
        cache.drop("bad")
    assert cache.get("bad") is None


def test_a_process_that_can_write_no_file_keeps_its_entries(tmp_path):
    (tmp_path / "file").write_text("")
    cache = AlgorithmCache(tmp_path / "file" / "cusparselt.json")  # its folder cannot be made
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache.put("a", [1, 2, 3, 4])
        cache.put("b", [])
        cache.drop("a")
    assert [str(warning.message).count("MASKLLM_CACHE_DIR") for warning in caught] == [1]
    assert (cache.get("a"), cache.get("b")) == (None, [])


def test_a_file_that_cannot_be_read_is_as_none(tmp_path, monkeypatch):
    (tmp_path / "cusparselt.json").mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be read or written"):
        cache = AlgorithmCache(tmp_path / "cusparselt.json")
    cache.put("a", [1, 2, 3, 4])
    assert cache.get("a") == [1, 2, 3, 4]


@pytest.mark.parametrize("content", ["{", '{"key": [1, 2]}', "[1]", '{"key": ["a", 1, 2, 3]}', '{"key": [true, 1, 2, 3]}'])
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
    assert token_bucket(tokens) == bucket
