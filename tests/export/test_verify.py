"""`maskllm verify`: every contradiction is seen and named, and what is right is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.export.compress import CompressSettings, compress
from maskllm.export.huggingface import export
from maskllm.export.pattern_search import FoundPattern, found_pattern
from maskllm.export.trim import trim
from maskllm.huggingface.mask_file import open_mask_file, write_mask_file
from maskllm.huggingface.weights_hash import StatedHash, read_hash, weights_sha256, write_hash
from maskllm.patterns import Pattern
from tests.checkpoints.changed import write_changed
from tests.families.tiny import write_tiny
from tests.inference.sparse_models import write_sparse

UP = "model.layers.1.mlp.up_proj.weight"
TOO_MANY = "with more than 2 kept weights"
NORM = "model.norm.weight"


def change(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of model.safetensors; None removes one."""
    tensors = {
        name: tensor for name, tensor in (load_file(directory / "model.safetensors") | changes).items() if tensor is not None
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def sparse_of(dense: Path, sparse: Path, masks: Path, *, in_out: bool = False) -> None:
    """Write 2:4 weights of a dense model by magnitude, their mask file, and the hash of the weights."""
    shutil.copytree(dense, sparse)
    kept = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if weight.dim() == 2 and (".layers." in name or ".h." in name):
            matrix = weight.t() if in_out else weight
            ranks = matrix.abs().unflatten(1, (-1, 4)).argsort(-1, descending=True).argsort(-1)
            mask = (ranks < 2).flatten(1)
            kept[name] = (mask.t() if in_out else mask).contiguous()
    weights = load_file(dense / "model.safetensors")
    change(sparse, {name: weights[name] * mask for name, mask in kept.items()})
    write_mask_file(masks, kept.items())
    write_hash(sparse, StatedHash(weights_sha256(sparse)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A folder with a LLaMA as dense, sparse and masks.npz. Only read it."""
    path = tmp_path_factory.mktemp("verify")
    write_tiny("llama3", path / "dense", torch.bfloat16)
    sparse_of(path / "dense", path / "sparse", path / "masks.npz")
    return path


@pytest.fixture
def files(originals, tmp_path) -> Path:
    """A copy of `originals`."""
    return Path(shutil.copytree(originals, tmp_path / "files"))


@pytest.fixture
def verified(capsys):
    """Call it to run `maskllm verify`; returns the exit status, the lines of what is not as claimed, and all lines."""

    def run(*words: object) -> tuple[int, list[str], list[str]]:
        capsys.readouterr()
        status = main(["verify", *map(str, words)])
        lines = capsys.readouterr().out.splitlines()
        return status, [line.removeprefix("NOT AS CLAIMED: ") for line in lines if line.startswith("NOT AS CLAIMED: ")], lines

    return run


def claims(files: Path) -> list[object]:
    return ["--model", files / "sparse", "--mask", files / "masks.npz", "--dense", files / "dense", "--pattern", "2:4"]


def test_all_as_claimed_is_a_line_each(originals, verified, tmp_path):
    status, wrong, lines = verified(*claims(originals), "--json", tmp_path / "f.json")
    weights = sum(weight.numel() for name, weight in load_file(originals / "sparse/model.safetensors").items() if "_proj" in name)
    assert (status, wrong) == (0, [])
    assert lines == [
        f"{originals / 'sparse'}: 21 tensors, weights sha256 {weights_sha256(originals / 'sparse')}, as weights_sha256.json states",
        "14 matrices are 2:4",
        f"masks of {originals / 'masks.npz'}: compared with 14 matrices; 0 of {weights // 2:,} kept weights are zero",
        f"dense model {originals / 'dense'}: kept weights are the originals, bit for bit, in 14 of 14 matrices; 7 of 7 other tensors "
        "are the same",
        "all as claimed",
    ]
    report = json.loads((tmp_path / "f.json").read_text())
    assert report["as_claimed"] and report["matrices"][UP] == {
        "pattern": "2:4",
        "broken_blocks": 0,
        "zeros": 0.5,
        "kept": 48 * 16,
        "kept_zeros": 0,
        "changed": 0,
    }


def test_without_claims_the_weights_tell_their_patterns(originals, files, verified):
    assert verified("--model", originals / "dense")[::2] == (
        0,
        [
            f"{originals / 'dense'}: 21 tensors, weights sha256 {weights_sha256(originals / 'dense')} (no weights_sha256.json states it)",
            "14 matrices are dense",
            "all as claimed",
        ],
    )
    weight = torch.ones(48, 32, dtype=torch.bfloat16)
    (files / "sparse/weights_sha256.json").unlink()
    change(files / "sparse", {UP: weight})
    assert verified("--model", files / "sparse")[2][1:3] == ["13 matrices are 2:4, 1 matrix is dense", f"{UP}: dense, 0.0% zeros"]


def with_outside(weight):
    weight[5, 4:8] = torch.tensor([0.0, 1.0, 1.0, 1.0])


def with_other_mask(weight):
    weight[5, 4:8] = weight[5, 4:8].flip(0).roll(1)


def with_one_bit(weight):
    column = int(weight[5].nonzero()[0])
    weight.view(torch.int16)[5, column] ^= 1


def with_a_kept_zero(weight):
    weight[5, int(weight[5].nonzero()[0])] = 0


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (with_outside, [f"{UP}: is not 2:4: 1 of 384 blocks {TOO_MANY}; output 5, block 1 (inputs 4 to 7) has 3"]),
        (with_other_mask, [" that the mask removes; the first is output 5, input "]),
        (with_one_bit, [f"{UP}: kept weights that are not the dense model's: 1 of 768; the first is output 5, input "]),
        (with_a_kept_zero, [f"{UP}: kept weights that are not the dense model's: 1 of 768; the first is output 5, input "]),
    ],
)
def test_a_changed_weight_is_named_with_its_block(edit, words, files, verified):
    weight = load_file(files / "sparse/model.safetensors")[UP]
    edit(weight)
    change(files / "sparse", {UP: weight})
    status, wrong, lines = verified(*claims(files))
    assert status == 1
    assert all(line.startswith((UP, "weights_sha256.json states the weights sha256 ")) for line in wrong)
    assert all(any(word in line for line in wrong) for word in words), wrong
    assert "(block 1)" in "".join(wrong) or "block 1 " in "".join(wrong) or edit in (with_one_bit, with_a_kept_zero)
    assert lines[-1] == f"{len(wrong)} not as claimed"


def test_a_kept_weight_that_was_zero_in_the_dense_model_is_no_contradiction(files, verified):
    weight = load_file(files / "sparse/model.safetensors")[UP]
    places = weight != 0
    dense = load_file(files / "dense/model.safetensors")[UP]
    row = int(places.sum(1).argmax())
    column = int(places[row].nonzero()[0])
    weight[row, column], dense[row, column] = 0.0, -0.0
    change(files / "sparse", {UP: weight})
    change(files / "dense", {UP: dense})
    write_hash(files / "sparse", StatedHash(weights_sha256(files / "sparse")))
    status, wrong, lines = verified(*claims(files))
    assert (status, wrong) == (0, [])
    assert "; 1 of " in lines[2] and lines[2].endswith("kept weights are zero")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({NORM: 2 * torch.ones(32, dtype=torch.bfloat16)}, f"{NORM}: differs from the dense model's"),
        ({NORM: torch.ones(32)}, f"{NORM}: is F32 [32]; the dense model's is BF16 [32]"),
        ({NORM: torch.ones(31, dtype=torch.bfloat16)}, f"{NORM}: has shape [31]; config.json asks for [32]"),
        ({NORM: None}, f"{NORM}: is missing, and config.json asks for it"),
        ({UP: None}, f"{UP}: has a mask in MASKS, and the model no such matrix"),
        ({"model.layers.0.extra.weight": torch.ones(2)}, "model.layers.0.extra.weight: is no tensor of the model in config.json"),
        ({"model.layers.0.extra.weight": torch.ones(2)}, "model.layers.0.extra.weight: is not in the dense model"),
    ],
)
def test_other_tensors_are_compared_too(changes, words, files, verified):
    change(files / "sparse", changes)
    status, wrong, _ = verified(*claims(files))
    assert status == 1
    assert words.replace("MASKS", str(files / "masks.npz")) in wrong
    assert wrong[-1].startswith("weights_sha256.json states the weights sha256 ")


def test_a_matrix_without_a_mask_is_named(files, verified):
    masks = open_mask_file(files / "masks.npz")
    kept = {
        name: masks.mask(name, (48, 32) if "gate" in name or "up" in name else (32, 48)) for name in masks.names if "mlp" in name
    }
    write_mask_file(files / "masks.npz", ((name, mask) for name, mask in kept.items() if name != UP))
    status, wrong, _ = verified("--model", files / "sparse", "--mask", files / "masks.npz")
    assert status == 1 and f"{UP}: has no mask in {files / 'masks.npz'}" in wrong and len(wrong) == 1 + 8


def test_a_mask_that_breaks_the_pattern_is_named(files, verified):
    masks = open_mask_file(files / "masks.npz")
    shapes = {name: tuple(weight.shape) for name, weight in load_file(files / "sparse/model.safetensors").items()}
    kept = {name: masks.mask(name, shapes[name]) for name in masks.names}
    kept[UP][2, 8:12] = True
    write_mask_file(files / "masks.npz", kept.items())
    wrong = verified(*claims(files))[1]
    assert wrong[0].startswith(f"{UP}: its mask is not 2:4: 1 of 384 blocks {TOO_MANY}; output 2, block 2 (inputs 8 to 11) has 4")


def test_weights_of_gpt2_are_read_as_inputs_times_outputs(tmp_path, verified):
    write_tiny("gpt2", tmp_path / "dense", torch.float32)
    sparse_of(tmp_path / "dense", tmp_path / "sparse", tmp_path / "masks.npz", in_out=True)
    status, wrong, lines = verified(*claims(tmp_path))
    assert (status, wrong, lines[1]) == (0, [], "8 matrices are 2:4")
    name = "transformer.h.1.mlp.c_fc.weight"
    weight = load_file(tmp_path / "sparse/model.safetensors")[name]
    assert weight.shape == (32, 48)
    removed = int((weight[4:8, 7] == 0).nonzero()[0])
    weight[4 + removed, 7] = 1
    change(tmp_path / "sparse", {name: weight})
    wrong = verified(*claims(tmp_path))[1]
    assert wrong[0] == f"{name}: is not 2:4: 1 of 384 blocks {TOO_MANY}; output 7, block 1 (inputs 4 to 7) has 3"
    place = f"the first is output 7, input {4 + removed} (block 1)"
    assert wrong[1] == f"{name}: has 1 non-zero weight that the mask removes; {place}"


def test_trained_weights_are_as_claimed_if_the_directory_says_so(tiny_dense, tiny_hf, tmp_path, verified):
    from maskllm.patterns import Pattern
    from maskllm.pruning.megatron import prune_without_data
    from maskllm.pruning.solve import PruneSettings

    prune_without_data(str(tiny_dense), str(tmp_path / "pruned"), PruneSettings("magnitude", Pattern(2, 4)))
    trim(tmp_path / "pruned", tmp_path / "trimmed")
    checkpoint = resolve(tmp_path / "trimmed")
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    info = dataclasses.replace(checkpoint.info, details={**checkpoint.info.details, "weights_dtype": "bfloat16"})
    write_changed(checkpoint, tmp_path / "moved", {key: 2 * checkpoint.tensors[key].load()}, info)
    export(tmp_path / "moved", tmp_path / "hf", mask_file=tmp_path / "masks.npz")
    assert read_hash(tmp_path / "hf") == StatedHash(weights_sha256(tmp_path / "hf"), "trained")
    claimed = ["--model", tmp_path / "hf", "--mask", tmp_path / "masks.npz", "--dense", tiny_hf]
    status, wrong, lines = verified(*claimed)
    assert (status, wrong) == (0, [])
    assert "bit for bit, in 27 of 28 matrices (weights_sha256.json says that they were trained); " in lines[3]
    (tmp_path / "hf/weights_sha256.json").unlink()
    status, wrong, _ = verified(*claimed)
    assert status == 1 and [line.split(":")[0] for line in wrong] == ["model.layers.1.mlp.down_proj.weight"]


def test_updated_weights_leave_other_tensors_alone(files, verified):
    tensors = load_file(files / "sparse/model.safetensors")
    change(files / "sparse", {UP: 2 * tensors[UP]})
    write_hash(files / "sparse", StatedHash(weights_sha256(files / "sparse"), "updated by sparsegpt"))
    assert verified(*claims(files))[:2] == (0, [])
    change(files / "sparse", {NORM: 2 * tensors[NORM]})
    write_hash(files / "sparse", StatedHash(weights_sha256(files / "sparse"), "updated by sparsegpt"))
    assert verified(*claims(files))[:2] == (1, [f"{NORM}: differs from the dense model's"])


@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
@pytest.mark.parametrize("bits", [None, 8])
def test_compressed_checkpoints(kind, bits, tmp_path, verified):
    write_tiny(kind, tmp_path / "dense", torch.bfloat16)
    sparse_of(tmp_path / "dense", tmp_path / "whole", tmp_path / "masks.npz", in_out=kind == "gpt2")
    group_size = 16 if bits else 128
    compress(tmp_path / "whole", tmp_path / "sparse", CompressSettings(bits, group_size))
    status, wrong, lines = verified(*claims(tmp_path))
    assert (status, wrong) == (0, [])
    assert lines[1] == f"{14 if kind == 'llama3' else 8} matrices are 2:4"
    assert ("config.json says that they are rounded" in lines[3]) == (bits == 8)
    name = next(name for name in load_file(tmp_path / "sparse/model.safetensors") if name.endswith(".values"))
    places = load_file(tmp_path / "sparse/model.safetensors")[name.replace("values", "places")]
    change(tmp_path / "sparse", {name.replace("values", "places"): places.fill_(0)})
    assert verified(*claims(tmp_path))[0] == 2


def test_directories_that_others_made(originals, files, tmp_path, verified):
    tensors = load_file(files / "sparse/model.safetensors")
    config = json.loads((files / "sparse/config.json").read_text())
    (files / "sparse/weights_sha256.json").unlink()
    # The base model alone, without its prefix.
    base = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(base, files / "sparse/model.safetensors")
    (files / "sparse/config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    status, wrong, lines = verified(*claims(files))
    assert (status, wrong) == (1, ["lm_head.weight: is missing, and the dense model has it"]) and lines[1] == "14 matrices are 2:4"
    # A family that has no parameter map.
    write_sparse(tmp_path / "t5", "t5")
    assert verified("--model", tmp_path / "t5", "--pattern", "2:4", "--dense", tmp_path / "t5")[:2] == (0, [])
    # A copy of a tied tensor, once equal and once not.
    write_tiny("llama3.2", tmp_path / "tied", torch.float32)
    embedding = load_file(tmp_path / "tied/model.safetensors")["model.embed_tokens.weight"]
    for copy, wanted in ((embedding.clone(), []), (embedding + 1, ["lm_head.weight"])):
        change(tmp_path / "tied", {"lm_head.weight": copy})
        assert [line.split(":")[0] for line in verified("--model", tmp_path / "tied")[1]] == wanted


def test_input_that_cannot_be_read_has_status_2(files, capsys):
    def error(*words: object) -> str:
        assert main(["verify", "--model", str(files / "sparse"), *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "no such directory" in error("--dense", files / "nope")
    assert "no such mask file" in error("--mask", files / "nope.npz")
    assert "--mask-base: belongs to a mask file" in error("--mask-base", files / "masks.npz")
    assert "wanted N:M" in error("--pattern", "4:2:1")
    write_mask_file(files / "small.npz", [(UP, torch.ones(2, 4, dtype=torch.bool))])
    assert f"the mask of {UP} is uint8" in error("--mask", files / "small.npz")
    (files / "sparse/weights_sha256.json").write_text('{"weights_sha256": 3}')
    assert "weights_sha256.json: weights_sha256 is 3" in error()
    config = files / "sparse/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    assert "its weights are quantized" in error()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (4, 8), (7, 16), (16, 64), (3, 12)])
def test_a_pattern_is_found_from_random_masks_with_kept_zeros(n, m):
    generator = torch.Generator().manual_seed(n * m)
    kept = torch.rand(200, 192 // m, m, generator=generator).argsort(-1).lt(n).flatten(1)
    assert found_pattern(kept) == FoundPattern(Pattern(n, m), 0)
    few_zeros = kept & (torch.rand(kept.shape, generator=generator) > 0.02)
    assert found_pattern(few_zeros) == FoundPattern(Pattern(n, m), 0)
    kept[7, :m] = True
    assert found_pattern(kept) == FoundPattern(Pattern(n, m), 1)


def test_no_pattern_is_found_in_dense_and_unstructured_matrices():
    generator = torch.Generator().manual_seed(0)
    for zeros in (0.0, 0.3, 0.5, 0.8):
        assert found_pattern(torch.rand(300, 192, generator=generator) >= zeros) is None
    assert found_pattern(torch.zeros(4, 8, dtype=torch.bool)) is None
