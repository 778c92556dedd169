"""The perplexity of a model with one-shot 2:4 masks, by method: magnitude, Wanda, SparseGPT, and SparseGPT with its weight updates.

    python -m benchmarks.one_shot --hf DIR --calibration FILE --eval-data FILE [--samples 8] [--seq-length 512] [--seed 0] [--json FILE]

DIR is a Hugging Face checkpoint of a LLaMA-like model, which is pruned in memory, in fp32. The calibration windows are those of
`maskllm prune --pack`. Perplexity is that of the first windows of the text, read as it is.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskllm.evaluation.huggingface import hf_window_nlls
from maskllm.evaluation.perplexity import cut_windows, perplexity
from maskllm.files import write_json
from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, magnitude_mask, prune_hf
from maskllm.pruning.calibration import open_documents, sample_windows

PATTERN = Pattern(2, 4)
CHARACTERS_PER_TOKEN = 10
"""More than any text has in the mean, so that the start of the text is enough."""
CALIBRATED = {
    "wanda": PruneSettings("wanda", PATTERN),
    "sparsegpt": PruneSettings("sparsegpt", PATTERN),
    "sparsegpt, updated": PruneSettings("sparsegpt", PATTERN, update_weights=True),
}


def measure(
    hf: str | Path, calibration: str | Path, text: str, *, samples: int, seq_length: int, seed: int, windows: tuple[int, int]
) -> dict[str, float]:
    """The perplexity of the dense model and of each method. `windows`: number and length."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    documents = open_documents(calibration, hf, append_eod=True)
    tokens = sample_windows(documents, samples, seq_length, seed=seed, pack=True)
    start = text[: CHARACTERS_PER_TOKEN * windows[0] * windows[1]]
    held_out = cut_windows(torch.tensor(AutoTokenizer.from_pretrained(hf)(start).input_ids), windows[1], windows[0])
    found = {"dense": perplexity(hf_window_nlls(model), held_out).perplexity}
    for name, settings in CALIBRATED.items():
        pruned = copy.deepcopy(model)
        prune_hf(pruned, tokens, settings)
        found[name] = perplexity(hf_window_nlls(pruned), held_out).perplexity
    for linear in [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]:
        linear.weight.data *= magnitude_mask(linear.weight.data, PATTERN)
    return found | {"magnitude": perplexity(hf_window_nlls(model), held_out).perplexity}


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--eval-data", required=True, type=Path, metavar="FILE", help="held-out text")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens in each")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the windows")
    parser.add_argument(
        "--windows", type=int, nargs=2, default=(4, 1024), metavar=("N", "S"), help="held-out windows and their tokens"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    settings = {"samples": args.samples, "seq_length": args.seq_length, "seed": args.seed}
    text = args.eval_data.read_text(encoding="utf-8")
    found = measure(args.hf, args.calibration, text, windows=tuple(args.windows), **settings)
    for name, value in found.items():
        print(f"{name:20} {value:10.2f}")
    if args.json:
        write_json(args.json, settings | {"windows": args.windows, "perplexity": found})


if __name__ == "__main__":
    main()
