"""What several rooms' tests share: a tiny model, its checkpoints, a tiny dataset and real processes under torchrun."""

from __future__ import annotations

import os
import pydoc_data.topics
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import megatron_patches
from tests.ranks import Pool, heed_interrupts

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is no directory is a hub id
megatron_patches.import_megatron()
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the other worker has the other core

LFS_POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
size 4976698672
"""
"""What a clone without git-lfs has in place of a large file."""

TEST_DATA_BESIDE_CHECKOUT = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests go first, so that the workers end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def real_data(name: str) -> Path:
    """The path of the file `name` in the folder of real test data. CONTRIBUTING.md lists the files.

    The environment variable MASKLLM_TEST_DATA names the folder. If it is not set, a test without its file is skipped; if it is set, the
    test fails.
    """
    folder = os.environ.get("MASKLLM_TEST_DATA")
    path = Path(folder or TEST_DATA_BESIDE_CHECKOUT) / name
    if not path.exists():
        if folder:
            pytest.fail(f"MASKLLM_TEST_DATA={folder}: found no {name}; CONTRIBUTING.md says where to get it", pytrace=False)
        pytest.skip(f"needs {name}: set MASKLLM_TEST_DATA to the folder of real test data (CONTRIBUTING.md)")
    return path


def torchrun(
    processes: int, module: str, *arguments: object, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run `python -m MODULE ARGUMENTS` in `processes` processes under torchrun; one thread each.

    `ranks` does so in a fraction of the time, where neither torchrun nor that the processes are new is what is tested.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", module]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=heed_interrupts,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-6000:]
    return done


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """`ranks(2, MODULE, ARGUMENTS...)` runs a program in two ranks, as torchrun would, in processes that need no time for imports."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with grouped queries, gated MLP and byte vocabulary, in bf16, as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("tiny") / "hf"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_dense(tiny_hf: Path) -> Path:
    """`tiny_hf` as a Megatron checkpoint."""
    from maskllm.checkpoints.convert import convert

    path = tiny_hf.parent / "dense"
    convert(str(tiny_hf), str(path))
    return path


@pytest.fixture(scope="session")
def tiny_pruned(tiny_dense: Path) -> Path:
    """`tiny_dense` with magnitude masks."""
    from maskllm.patterns import Pattern
    from maskllm.pruning.megatron import prune_without_data
    from maskllm.pruning.solve import PruneSettings

    path = tiny_dense.parent / "pruned"
    prune_without_data(str(tiny_dense), str(path), PruneSettings("magnitude", Pattern(2, 4)))
    return path


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of an indexed dataset of real text, a byte a token."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    prefix = str(tmp_path_factory.mktemp("data") / "bytes_text_document")
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=np.uint16)
    for text in list(pydoc_data.topics.topics.values())[:40]:
        tokens = np.frombuffer(text.encode()[:2000], dtype=np.uint8)
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [len(tokens)])
    builder.finalize(get_idx_path(prefix))
    return prefix


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """For tests that train in their own process: training handles SIGTERM, SIGINT and SIGHUP."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
