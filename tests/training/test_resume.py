"""A resumed run ends as the uninterrupted one: bit for bit, or to rounding under another layout."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.finding import LATEST, is_complete, iterations
from maskllm.checkpoints.reading import resolve
from maskllm.patterns import Pattern
from maskllm.pruning.megatron import prune_without_data
from maskllm.pruning.solve import PruneSettings
from tests.training.conftest import STEPS, arguments, assert_bit_identical, assert_close, learned_tensors, metrics, steps_done


def catches_sigterm(process: psutil.Process) -> bool:
    """Whether the process has installed a handler for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def values_logged(save: Path, *keys: str) -> list[tuple]:
    """The values of `keys` after each step."""
    return [tuple(line[key] for key in keys) for line in metrics(save)]


def iterations_logged(save: Path) -> list[int]:
    return [line["iteration"] for line in metrics(save)]


@pytest.mark.slow
def test_a_run_that_is_killed_twice_and_damaged_ends_as_the_uninterrupted_one(
    start, ranks, tmp_path, whole, tiny_dataset, tiny_pruned
):
    """One run has four accidents, one after the other."""
    save = tmp_path / "run"
    values = arguments(save, tiny_dataset, tiny_pruned, async_save=True)

    run = start(2, values)
    run.wait_for(lambda: (save / "metrics.jsonl").is_file() and catches_sigterm(run.rank(0)))  # right before the first step
    killed = run.rank(1)
    killed.kill()
    assert run.end() == 1
    assert "lost the connection to another rank" in run.error
    assert f"rank 1 (process {killed.pid}) has died" in run.error
    assert not (save / LATEST).exists(), "the first step was over too soon"

    run = start(2, values)
    run.wait_for(lambda: list(save.glob(f".iter_{STEPS:07d}.*.tmp")))
    run.kill_all()
    assert steps_done(save) == STEPS - 2, "the last checkpoint was complete too soon"
    assert not is_complete(save / f"iter_{STEPS:07d}")

    newest = max((save / f"iter_{STEPS - 2:07d}").glob("*.distcp"))
    newest.write_bytes(newest.read_bytes()[:-1] + b"\1")
    refused = ranks(2, "maskllm.train", *values, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count(f"{newest}: found checksum") == 1
    assert "(--auto-fallback goes on from iter_0000002)" in refused.stderr

    done = ranks(2, "maskllm.train", *values, "--auto-fallback")
    assert f"{newest}: found checksum" in done.stderr
    assert "--auto-fallback: going on from iter_0000002" in done.stderr
    assert iterations_logged(save) == list(range(1, STEPS + 1))
    keys = ("iteration", "loss", "grad_norm", "mean_max_probability")
    assert values_logged(save, *keys) == values_logged(whole, *keys), "the run saw other data or other masks"
    assert not [entry for entry in save.iterdir() if entry.name.startswith(".iter")], "a half-written checkpoint is still there"
    assert_bit_identical(whole, save)


@pytest.mark.slow
def test_a_process_that_writes_a_checkpoint_ends_with_its_rank(start, tmp_path, tiny_dataset, tiny_pruned):
    """Otherwise it could wait for ever for its dead parent, and hold the lock of the directory meanwhile.

    Up to megatron-core 0.18 a writer starts processes of its own, from 0.19 on threads.
    """
    starts_processes = hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc")
    run = start(None, arguments(tmp_path / "run", tiny_dataset, tiny_pruned, steps=2000, save_interval=1, async_save=True))
    rank = psutil.Process(run.process.pid)
    writers: list[psutil.Process] = []

    def caught_writing() -> bool:
        writers[:] = rank.children(recursive=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            for writer in writers:
                writer.suspend()
            if any(writer.ppid() != rank.pid or not starts_processes for writer in writers):
                return True
        for writer in writers:
            with contextlib.suppress(psutil.NoSuchProcess):
                writer.resume()
        return False

    run.wait_for(caught_writing)
    first = [
        writer for writer in writers if writer.ppid() == rank.pid and starts_processes
    ]  # these have asked the kernel to end with the rank
    rank.kill()
    _, alive = psutil.wait_procs(first, timeout=30)
    assert not alive
    _, alive = psutil.wait_procs(writers, timeout=1)
    for writer in alive:  # these were stopped before they could ask the kernel
        writer.resume()
    _, alive = psutil.wait_procs(alive, timeout=30)
    assert not alive


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(start, tmp_path, whole, tiny_dataset, tiny_pruned):
    """A rank is killed in the first step, and again after a save."""
    save = tmp_path / "run"
    values = arguments(save, tiny_dataset, tiny_pruned, async_save=True, keep_last=1)
    run = start(2, values, "--max-restarts=2")

    def in_the_first_step() -> bool:
        """Whether SIGTERM, which torchrun sends to rank 0 when rank 1 has died, does not end rank 0 without a message."""
        return (save / "metrics.jsonl").is_file() and catches_sigterm(run.rank(0))

    killed = []
    for moment in (in_the_first_step, lambda: steps_done(save) >= 2):
        run.wait_for(moment)
        killed.append(run.rank(1))
        killed[-1].kill()
        killed[-1].wait(60)
    assert run.end() == 0, run.console[-4000:]
    assert run.console.count("lost the connection to another rank") == 2, run.console
    assert all(f"rank 1 (process {process.pid}) has died" in run.console for process in killed)
    assert run.console.count("starting from") == 2, "the first step was over too soon"
    assert run.console.count("resuming") == 1
    assert_bit_identical(whole, save)
    loaded = int(run.console.split("resuming ")[1].split("iter_")[1][:7])
    kept = [path.name for path in iterations(save)]
    assert kept == [f"iter_{STEPS:07d}", *([f"iter_{loaded:07d}"] if loaded < STEPS else [])]


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_status_75(start, tmp_path, tiny_dataset, tiny_pruned):
    save = tmp_path / "run"
    values = arguments(save, tiny_dataset, tiny_pruned, steps=2000, keep_last=2)
    run = start(None, values)
    run.wait_for(lambda: steps_done(save) >= 2)

    second = start(None, values)
    assert second.end() == 1
    assert second.console.count("\n") == 1
    assert f"process {run.process.pid} on " in second.console
    assert " is writing there" in second.console

    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75
    stopped = steps_done(save)
    assert 2 <= stopped < 2000
    assert f"stopped by a signal after iteration {stopped}; saved at iteration {stopped}" in run.console
    assert "Traceback" not in run.console

    run = start(2, values)  # the same with more than one rank
    run.wait_for(lambda: steps_done(save) > stopped)
    assert f"iter_{stopped:07d} after iteration {stopped} of 2000" in run.console
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    stopped_again = steps_done(save)
    assert run.console.count(f"stopped by a signal after iteration {stopped_again}; saved at iteration {stopped_again}") == 1
    lines = iterations_logged(save)
    assert stopped_again == lines[-1]
    assert lines == list(range(1, len(lines) + 1))


@pytest.mark.slow
def test_a_closed_terminal_stops_the_run_as_sigterm_does(start, tmp_path, tiny_dataset, tiny_pruned):
    save = tmp_path / "run"
    run = start(None, arguments(save, tiny_dataset, tiny_pruned, steps=2000, save_interval=1000))
    run.wait_for(lambda: "train iteration 2 " in run.console)
    run.process.send_signal(signal.SIGHUP)
    assert run.end() == 75
    assert f"saved at iteration {steps_done(save)}; run the same command" in run.console


@pytest.mark.slow
def test_a_closed_pipe_does_not_stop_the_run(ranks, tmp_path, tiny_dataset, tiny_pruned):
    ours, its = os.pipe()
    job = ranks.start(None, ["-m", "maskllm.train", *arguments(tmp_path / "run", tiny_dataset, tiny_pruned)], [its, its])
    os.close(its)
    with os.fdopen(ours) as pipe:
        assert any("train iteration 1 " in line for line in pipe)
    assert job.wait(200) == 0
    assert steps_done(tmp_path / "run") == STEPS


def copy_of_step_2(whole: Path, save: Path) -> Path:
    shutil.copytree(whole / "iter_0000002", save / "iter_0000002")
    (save / LATEST).write_text("2\n")
    return save


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "layout"),
    [(1, {}), (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})],
    ids=["data parallel 1", "tensor 2 and pipeline 2"],
)
def test_another_layout_goes_on_to_the_same_end(processes, layout, ranks, tmp_path, whole, tiny_dataset, tiny_pruned):
    save = copy_of_step_2(whole, tmp_path / "run")
    done = ranks(processes, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, async_save=True, **layout))
    assert "iter_0000002 after iteration 2 of 6" in done.stderr
    losses = dict(values_logged(whole, "iteration", "loss"))
    assert dict(values_logged(save, "iteration", "loss")) == pytest.approx(
        {step: losses[step] for step in range(3, STEPS + 1)}, rel=1e-5
    )
    assert_close(whole, save)
    before, after = learned_tensors(save / "iter_0000002"), learned_tensors(save)
    fc1 = [key for key in after if key.endswith("mlp.linear_fc1.mask_logits") and not key.startswith("optimizer")]
    assert fc1 and not any(torch.equal(before[key], after[key]) for key in fc1)


@pytest.fixture(scope="module")
def whole_distributed(tmp_path_factory, ranks, tiny_dataset, tiny_pruned) -> Path:
    """As `whole`, with Megatron's distributed optimizer."""
    save = tmp_path_factory.mktemp("whole_distributed") / "run"
    ranks(2, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, use_distributed_optimizer=True))
    return save


@pytest.mark.slow
def test_a_distributed_optimizer_goes_on_exactly_and_on_another_number_of_ranks(
    ranks, tmp_path, whole_distributed, tiny_dataset, tiny_pruned
):
    for processes in (2, 1):
        save = copy_of_step_2(whole_distributed, tmp_path / f"on_{processes}")
        done = ranks(processes, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, use_distributed_optimizer=True))
        assert f"iter_0000002 after iteration 2 of {STEPS}" in done.stderr
    assert_bit_identical(whole_distributed, tmp_path / "on_2")
    assert_close(whole_distributed, tmp_path / "on_1")


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_another_adam_goes_on_to_the_same_end(distributed, request, ranks, tmp_path, tiny_dataset, tiny_pruned):
    """For example from a container with Transformer Engine to a machine without it, and back."""
    options = {"use_distributed_optimizer": True} if distributed else {}
    whole = request.getfixturevalue("whole_distributed" if distributed else "whole")
    save = copy_of_step_2(whole, tmp_path / "run")
    for first, module in ((2, "tests.training.fused_adam_worker"), (4, "maskllm.train")):
        done = ranks(1, module, *arguments(save, tiny_dataset, tiny_pruned, **options))
        assert f"after iteration {first} of {STEPS}" in done.stderr
        if first == 2:
            shutil.rmtree(save / f"iter_{STEPS:07d}")
            (save / LATEST).write_text("4\n")
    assert_close(whole, save)


@pytest.mark.slow
def test_other_data_are_refused_but_a_copy_of_the_same_is_not(ranks, tmp_path, whole, tiny_dataset, tiny_pruned):
    save = copy_of_step_2(whole, tmp_path / "run")
    moved = str(tmp_path / "moved")
    for suffix in (".bin", ".idx"):
        shutil.copy(tiny_dataset + suffix, moved + suffix)
    twice = arguments(save, tiny_dataset, tiny_pruned)
    twice[twice.index("--data-path") + 1 : twice.index("--pretrained-checkpoint")] = ["2", tiny_dataset, "1", moved]
    done = ranks(1, "maskllm.train", *twice, check=False)
    assert done.returncode == 1
    assert f"--data-path: these are not the data of the run in {save / 'iter_0000002'}" in done.stderr
    assert resolve(save).iteration == 2
    ranks(2, "maskllm.train", *arguments(save, moved, tiny_pruned))
    assert_bit_identical(whole, save)


@pytest.mark.slow
def test_a_directory_with_another_run_is_refused_and_left_alone(ranks, tmp_path, whole, tiny_dataset, tiny_pruned):
    save = copy_of_step_2(whole, tmp_path / "run")
    before = sorted(save.rglob("*"))
    for source in (whole / "iter_0000004", tiny_pruned):
        values = arguments(save, tiny_dataset, tiny_pruned, load=source, keep_last=1)
        done = ranks(1, "maskllm.train", *values, check=False)
        assert done.returncode == 1
        assert f"--save {save}: holds a run; go on with it by --load {save}, or name another --save" in done.stderr
    assert [path for path in sorted(save.rglob("*")) if ".lock" not in path.name and "logs" not in path.parts] == before


@pytest.mark.slow
def test_stored_dtypes_survive_and_a_link_to_an_iteration_resumes_elsewhere(ranks, tmp_path, tiny_dataset):
    """Only the first pipeline stage has a tensor in another dtype than the computation: bf16 embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0))
    model.model.embed_tokens.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    prune_without_data(tmp_path / "dense", tmp_path / "pruned", PruneSettings("magnitude", Pattern(2, 4)))
    save, fork = tmp_path / "run", tmp_path / "fork"
    options = {"steps": 4, "pipeline_model_parallel_size": 2}
    ranks(2, "maskllm.train", *arguments(save, tiny_dataset, tmp_path / "pruned", **options))
    (tmp_path / "middle").symlink_to(save / "iter_0000002")
    done = ranks(2, "maskllm.train", *arguments(fork, tiny_dataset, tmp_path / "pruned", load=tmp_path / "middle", **options))
    assert "after iteration 2 of 4" in done.stderr
    assert_bit_identical(save, fork)
    done = ranks(2, "maskllm.train", *arguments(tmp_path / "copy", tiny_dataset, tmp_path / "pruned", load=fork, **options))
    assert "after iteration 4 of 4" in done.stderr
    assert_bit_identical(save, tmp_path / "copy")
    embeddings = resolve(fork).tensors["embedding.word_embeddings.weight"].load()
    assert embeddings.dtype == torch.bfloat16
    assert torch.equal(embeddings, model.model.embed_tokens.weight)
