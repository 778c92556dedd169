"""Carry a general mask to domains: one set of weights, a mask a domain (MaskLLM, arXiv 2409.17481, section 4.3).

usage: python -m benchmarks.mask_transfer --hf DIR --general FILE... --domain NAME TRAIN HELD_OUT [--domain ...] --output DIR

A general 2:4 mask is learned on the corpus --general (JSON lines) from SparseGPT's, which is calibrated on it. Each domain's mask is
then learned on TRAIN (JSON lines, or a plain text with a sentence on each line) with the same number of steps from two priors: the
general mask, and SparseGPT's. All masks are evaluated on HELD_OUT as mask files over the same dense weights. Every step is a command that
is printed before it runs; a second call with the same --output skips finished steps and resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import megatron_patches

megatron_patches.import_megatron()

from maskllm.files import write_json, write_text  # noqa: E402
from maskllm.huggingface.mask_file import MaskFile, open_mask_file  # noqa: E402
from maskllm.quickstart.steps import Steps  # noqa: E402

M = 4
LINES = 20
GENERAL = Path("masks", "general.npz")


class Transfer:
    """The commands, with the settings of all trainings, and the numbers that they leave in the directory `output`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output = options.output
        self.steps = Steps(self.output)
        self.dense = self.output / "dense"
        self.general = self.output / GENERAL

    def verb(self, name: str, output: Path, *words: object) -> None:
        self.steps.run(name, output, [sys.executable, "-m", "maskllm", *words])

    def dataset(self, name: str, files: list[str]) -> Path:
        prefix, document = self.output / "data" / name, self.output / "data" / f"{name}_text_document"
        tokenizer = self.dense / "release" / "hf"
        words = ["--input", *files, "--output-prefix", prefix, "--tokenizer", tokenizer, "--append-eod"]
        self.verb(f"preprocess {name}", document.with_suffix(".idx"), "preprocess", *words)
        return document

    def documents(self, domain: str, file: str) -> str:
        """JSON lines with the text of `file`: the file itself, or LINES lines of a plain text as one document."""
        if file.removesuffix(".gz").endswith((".json", ".jsonl")):
            return file
        documents = self.output / "data" / f"{domain}.jsonl"
        documents.parent.mkdir(parents=True, exist_ok=True)
        with (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8") as text:
            lines = text.read().splitlines()
        joined = (" ".join(lines[start : start + LINES]) for start in range(0, len(lines), LINES))
        write_text(documents, "".join(f"{json.dumps({'text': text})}\n" for text in joined))
        return str(documents)

    def sparsegpt(self, data: Path) -> Path:
        pruned, options = self.output / "pruned" / "sparsegpt-general", self.options
        self.verb(
            "prune general", pruned, "prune", "--load", self.dense, "--output", pruned, "--method", "sparsegpt", "--pattern", "2:4",
            "--calibration-data", data, "--calibration-samples", options.calibration_samples, "--seq-length", options.seq_length,
            "--pack", "--params-dtype", options.params_dtype,
        )  # fmt: skip
        return pruned

    def learn(self, name: str, prior: Path, data: Path, iters: int) -> Path:
        learned, options = self.output / "learned" / name, self.options
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}", "-m", "maskllm.train",
            "--pretrained-checkpoint", prior, "--load", learned, "--save", learned, "--save-interval", 10, "--keep-last", 1,
            "--data-path", data, "--split", "1,0,0", "--eval-iters", 0, "--log-interval", 1,
            "--seq-length", options.seq_length, "--global-batch-size", options.global_batch_size, "--train-iters", iters,
            "--lr", options.lr, "--min-lr", options.min_lr, "--prior-strength", options.prior_strength,
            "--gumbel-scale-range", *options.gumbel_scale_range, "--params-dtype", options.params_dtype,
            "--pipeline-model-parallel-size", options.processes,
        ]  # fmt: skip
        self.steps.run(f"train {name}", learned, command, can_resume=True)
        return learned

    def masks(self, name: str, checkpoint: Path) -> Path:
        """Write the mask file of a pruned or trained checkpoint: the general one whole, the others as differences to it."""
        trimmed, hf, file = self.output / "trimmed" / name, self.output / "hf" / name, self.output / "masks" / f"{name}.npz"
        self.verb(f"trim {name}", trimmed, "trim", "--load", checkpoint, "--output", trimmed)
        base = [] if file == self.general else ["--mask-base", self.general]
        self.verb(f"export {name}", hf, "export", "--load", trimmed, "--output", hf, "--mask-file", file, *base)
        return file

    def evaluate(self, name: str, data: str, masks: Path | None = None) -> float:
        file, options = self.output / "evaluation" / f"{name}.json", self.options
        words = [
            "--model",
            options.hf,
            "--data",
            data,
            "--seq-length",
            options.eval_seq_length,
            "--max-windows",
            options.eval_windows,
        ]
        if masks is not None:
            words += ["--mask", masks, *([] if masks == self.general else ["--mask-base", self.general])]
        self.verb(f"evaluate {name}", file, "evaluate", *words, "--params-dtype", options.params_dtype, "--json", file)
        return json.loads(file.read_text())["perplexity"]

    def run(self) -> list[dict[str, Any]]:
        """All steps; returns the rows of the table."""
        options = self.options
        self.verb("convert", self.dense, "convert", "--hf", options.hf, "--output", self.dense)
        data = self.dataset("general", options.general)
        sparsegpt = self.sparsegpt(data)
        self.masks("general", self.learn("general", sparsegpt, data, options.general_iters))
        one_shot = self.masks("sparsegpt", sparsegpt)
        prior = self.output / "pruned" / "general"
        words = ["--load", self.dense, "--output", prior, "--method", "mask-file", "--mask", self.general, "--pattern", "2:4"]
        self.verb("prune from the general mask", prior, "prune", *words)
        rows = []
        for domain, train, held_out in options.domain:
            data = self.dataset(domain, [self.documents(domain, train)])
            learned = {
                start: self.masks(f"{domain}-from-{start}", self.learn(f"{domain}-from-{start}", path, data, options.domain_iters))
                for start, path in (("sparsegpt", sparsegpt), ("general", prior))
            }
            files = {
                "SparseGPT": one_shot,
                "learned from SparseGPT": learned["sparsegpt"],
                "general": self.general,
                "learned from the general mask": learned["general"],
            }
            rows.append({"domain": domain, "mask": "none (dense)", "perplexity": self.evaluate(f"{domain}-dense", held_out)})
            for mask, file in files.items():
                name = file.stem if file in learned.values() else f"{domain}-{file.stem}"
                rows.append(
                    {"domain": domain, "mask": mask, "perplexity": self.evaluate(name, held_out, file), **self.changes(file)}
                )
        return rows

    def changes(self, file: Path) -> dict[str, Any]:
        """How the masks differ from the general ones, and the sizes of the files."""
        general = open_mask_file(self.general)
        masks = general if file == self.general else open_mask_file(file, self.general)
        row = {"blocks_unlike_general": share_of_blocks(masks, general, self.dense), "bytes": file.stat().st_size}
        metrics = self.output / "learned" / file.stem / "metrics.jsonl"
        if metrics.is_file() and file != self.general:
            steps = [json.loads(line) for line in metrics.read_text().splitlines()]
            row["blocks_unlike_start"] = [step for step in steps if step["kind"] == "train"][-1]["changed_since_prior"]
        return row


def share_of_blocks(masks: MaskFile, others: MaskFile, dense: Path) -> float:
    """The share of the blocks of M weights that differ between two mask files of the model in the checkpoint `dense`."""
    from maskllm.checkpoints.reading import resolve
    from maskllm.families.registry import parameter_map

    config = resolve(dense).model_config
    differ = blocks = 0
    for mapping in parameter_map(config):
        if mapping.linear is not None:
            for name, shape in zip(mapping.hf, mapping.hf_shapes(config), strict=True):
                (one,), (other,) = (mapping.transpose([file.mask(name, shape)]) for file in (masks, others))
                unlike = (one != other).unflatten(1, (-1, M)).any(-1)
                differ, blocks = differ + int(unlike.sum()), blocks + unlike.numel()
    return differ / blocks


def main(argv: list[str] | None = None) -> None:
    """Parse, run, print the numbers and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face directory of the dense model")
    parser.add_argument("--general", required=True, nargs="+", metavar="FILE", help="JSON lines of the general corpus")
    parser.add_argument("--domain", required=True, nargs=3, action="append", metavar=("NAME", "TRAIN", "HELD_OUT"))
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="everything that is made")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    parser.add_argument("--general-iters", type=int, default=30)
    parser.add_argument("--domain-iters", type=int, default=20)
    parser.add_argument("--global-batch-size", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--lr", default="2e-3")
    parser.add_argument("--min-lr", default="2e-4")
    parser.add_argument("--prior-strength", default="5")
    parser.add_argument("--gumbel-scale-range", nargs=2, default=["500", "1000"])
    parser.add_argument("--calibration-samples", type=int, default=16)
    parser.add_argument("--eval-seq-length", type=int, default=512)
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--params-dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--processes", type=int, default=2, help="processes of a training, one pipeline stage each")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = Transfer(options).run()
    print(json.dumps(rows, indent=2))
    if options.json:
        names = (
            "general_iters",
            "domain_iters",
            "global_batch_size",
            "seq_length",
            "lr",
            "min_lr",
            "prior_strength",
            "gumbel_scale_range",
            "eval_windows",
        )
        settings = {name: getattr(options, name) for name in (*names, "calibration_samples", "eval_seq_length", "params_dtype")}
        write_json(options.json, {"settings": settings, "general_bytes": (options.output / GENERAL).stat().st_size, "rows": rows})


if __name__ == "__main__":
    main()
