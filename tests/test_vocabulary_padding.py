"""A vocabulary that no tensor-parallel size divides: losses as transformers', and weights that come back bit for bit.

Run as a program in ranks, this file computes the losses and the logits of checkpoints: LAYOUT TP CHECKPOINT...
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from maskllm import train
from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import load_model, resolve
from maskllm.cli import main
from maskllm.export.huggingface import export
from maskllm.families.registry import parameter_map
from maskllm.patterns import Pattern
from maskllm.planning.memory import Shapes
from maskllm.planning.models import named_model
from maskllm.pruning.megatron import prune_without_data
from maskllm.pruning.solve import PruneSettings
from tests.training.conftest import arguments, metrics

VOCABULARY = 257
MODELS = {
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    },
}  # fmt: skip
MULTIPLES = (1, 128)


@pytest.fixture(scope="module", params=MODELS)
def converted(request, tmp_path_factory) -> Path:
    """A folder with hf, for each of MULTIPLES a dense checkpoint of it, and a pruned one without padding."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**MODELS[request.param], vocab_size=VOCABULARY, initializer_range=0.15)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    for multiple in MULTIPLES:
        convert(folder / "hf", folder / f"dense{multiple}", make_vocab_size_divisible_by=multiple)
    prune_without_data(folder / "dense1", folder / "pruned", PruneSettings("magnitude", Pattern(2, 4)))
    return folder


def vocabulary_matrices(checkpoint: Path) -> list[torch.Tensor]:
    opened = resolve(checkpoint)
    names = [mapping.megatron for mapping in parameter_map(opened.model_config) if mapping.shape[0] == "vocab"]
    return [opened.tensors[name].load() for name in names]


@pytest.mark.parametrize(("multiple", "rows"), [(1, 257), (128, 384)])
def test_padding_is_zeros_and_leaves_with_the_export(converted, tmp_path, multiple, rows):
    matrices = vocabulary_matrices(converted / f"dense{multiple}")
    assert [matrix.shape[0] for matrix in matrices] == [rows] * len(matrices)
    assert not any(matrix[VOCABULARY:].any() for matrix in matrices)
    export(converted / f"dense{multiple}", tmp_path / "back")
    before, after = load_file(converted / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_default_is_megatrons(converted, tmp_path):
    assert main(["convert", "--hf", str(converted / "hf"), "--output", str(tmp_path / "dense")]) == 0
    assert {matrix.shape[0] for matrix in vocabulary_matrices(tmp_path / "dense")} == {384}
    with pytest.raises(SystemExit):
        main(["convert", "--hf", "x", "--output", "y", "--make-vocab-size-divisible-by", "0"])


def test_the_plan_counts_the_padding(converted):
    hidden, matrices = 32, len(vocabulary_matrices(converted / "dense1"))
    for name, tensor, rows in (("hf", 1, 384), ("dense128", 2, 384), ("dense1", 1, 257), ("dense1", 2, 258)):
        outside = Shapes(named_model(str(converted / name)), tensor).outside
        positions = 64 * hidden if matrices == 1 else 0
        assert outside["embedding"] == rows * hidden / tensor + positions
        assert outside["output_layer"] == (rows * hidden / tensor if matrices == 2 else 0)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_losses_and_logits_are_those_of_transformers(converted, ranks, tp):
    tokens = torch.randint(VOCABULARY, (2, 65), generator=torch.Generator().manual_seed(0))
    tokens[:, -2:] = VOCABULARY - 1  # the last token of the vocabulary, beside the padding
    torch.save(tokens, converted / "tokens.pt")
    paths = [converted / f"dense{multiple}" for multiple in MULTIPLES]
    ranks(tp, "tests.test_vocabulary_padding", tp, *paths)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(converted / "hf", dtype=torch.float32)(tokens[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, -1)
    for path in paths:
        found = torch.load(path / "found.pt", weights_only=True)
        torch.testing.assert_close(found["logits"], logits, rtol=0, atol=2e-5)
        torch.testing.assert_close(found["losses"], losses, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_training_and_resuming_under_any_layout(converted, ranks, tmp_path, tiny_dataset):
    def losses(save: Path, processes: int, **options: object) -> list[float]:
        ranks(processes, "maskllm.train", *arguments(save, tiny_dataset, converted / "pruned", steps=3, **options))
        return [step["loss"] for step in metrics(save)]

    tp2 = {"tensor_model_parallel_size": 2}
    expected = losses(tmp_path / "tp1", 1)
    assert len(expected) == 3
    assert losses(tmp_path / "tp2", 2, **tp2) == pytest.approx(expected, rel=1e-5)
    assert losses(tmp_path / "pp2", 2, pipeline_model_parallel_size=2) == pytest.approx(expected, rel=1e-5)
    for name, rows in (("tp1", 257), ("tp2", 258), ("pp2", 257)):
        assert {matrix.shape[0] for matrix in vocabulary_matrices(tmp_path / name)} == {rows}
    # What one layout saved, another one resumes.
    for name, other, processes, layout in (("tp1", "tp1_then_tp2", 2, tp2), ("tp2", "tp2_then_tp1", 1, {})):
        resumed = losses(tmp_path / other, processes, load=tmp_path / name / "iter_0000002", **layout)
        assert resumed == pytest.approx(expected[2:], rel=1e-5)
    before = load_file(converted / "hf" / "model.safetensors")
    for name in ("tp2", "tp1_then_tp2", "tp2_then_tp1"):
        assert main(["trim", "--load", str(tmp_path / name), "--output", str(tmp_path / f"{name}_trimmed")]) == 0
        export(tmp_path / f"{name}_trimmed", tmp_path / f"{name}_hf")
        after = load_file(tmp_path / f"{name}_hf" / "model.safetensors")
        assert before.keys() == after.keys()
        for key, weight in before.items():
            kept = after[key] != 0
            assert torch.equal(after[key][kept], weight[kept]), key
            assert weight.shape[0] != VOCABULARY or torch.equal(after[key], weight), key


@pytest.mark.usefixtures("signal_handlers")
def test_a_teacher_may_have_other_padding(converted, tmp_path, tiny_dataset):
    """Less than the student or more: a model under its own masks diverges as much from either form of the dense one."""
    prune_without_data(converted / "dense128", tmp_path / "pruned128", PruneSettings("magnitude", Pattern(2, 4)))
    found = []
    for student, teacher in ((converted / "pruned", 1), (converted / "pruned", 128), (tmp_path / "pruned128", 1)):
        save = tmp_path / f"{student.name}_{teacher}"
        options = {"kl_loss_coeff": 0.5, "teacher": converted / f"dense{teacher}", "steps": 1, "train": "both"}
        assert train.main(arguments(save, tiny_dataset, student, **options)) == 0
        found.append([step["kl"] for step in metrics(save)])
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


def compute(tp: str, *checkpoints: str) -> None:
    """Write the losses and the logits of each checkpoint's model to found.pt in its folder."""
    from maskllm.megatron.build import build_model
    from maskllm.megatron.process_groups import parallel_processes

    with parallel_processes(tensor_model_parallel_size=int(tp)), torch.no_grad():
        for path in map(Path, checkpoints):
            tokens = torch.load(path.parent / "tokens.pt", weights_only=True)
            checkpoint = resolve(path)
            model = build_model(checkpoint.model_config, params_dtype=torch.float32).eval()
            load_model(checkpoint, model)
            inputs, positions = tokens[:, :-1], torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
            losses = model(inputs, positions, None, labels=tokens[:, 1:].contiguous()).cross_entropy
            logits = model(inputs, positions, None)
            if torch.distributed.get_rank() == 0:
                torch.save({"losses": losses.contiguous(), "logits": logits.contiguous()}, path / "found.pt")


if __name__ == "__main__":
    compute(*sys.argv[1:])
