"""All measurements and all tables. CONTRIBUTING.md says how to add one.

In a command, `{data}` stands for the folder of real test data, `{quickstart}` for what `make quickstart` has written, `{dense}` for the
dense SmolLM2-135M in it, `{finetune}` for what examples/finetune/prepare.sh has written, and `{work}` for a folder that the measurements
of a group share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import finetuning, tables
from benchmarks.results import Result


@dataclass(frozen=True)
class Measurement:
    """A command and the result file that it makes, docs/benchmarks/results/NAME.json."""

    name: str
    command: str
    """`--json FILE` is added to it, unless it writes `output`."""
    minutes: float
    """Expected on two cores."""
    sources: tuple[str, ...]
    """Paths whose change makes a result older, besides the benchmark itself."""
    tiny: str | None = None
    """Options of the run in the tests, which come after those of the command. None: another measurement tests the same program."""
    output: str | None = None
    """The JSON file that the command writes by itself."""
    cuda: bool = False
    """Whether it needs a CUDA GPU."""


@dataclass(frozen=True)
class Table:
    """A table of results, between the markers `<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->` of any page."""

    name: str
    title: str
    """Its heading in docs/results.md."""
    measurements: tuple[str, ...]
    render: Callable[[Mapping[str, Result]], list[str]]
    """The Markdown lines from the results that there are, by the measurements' names."""
    made: str = "Measured"
    """How the numbers came about."""


MASK_KERNELS = (
    "csrc/include",
    *(
        f"csrc/cpu/{name}"
        for name in ("kernels.cpp", "kernels.h", "kernels.inl", "masked_weight.cpp", "matrix.cpp", "rounding.cpp")
    ),
    *(f"csrc/cpu/kernels_{name}.cpp" for name in ("avx2", "avx512", "portable")),
)
"""The kernels of masked weights and of masks on a CPU."""
TRAINING = (
    *MASK_KERNELS,
    "maskllm/data",
    "maskllm/families",
    "maskllm/masking",
    "maskllm/megatron",
    "maskllm/ops",
    "maskllm/pruning",
    "maskllm/training",
    "megatron_patches",
)
"""What decides which masks and weights a training finds."""
FINETUNING = (
    *MASK_KERNELS,
    "examples/finetune/table.py",
    "maskllm/finetuning",
    "maskllm/huggingface",
    "maskllm/masking",
    "maskllm/ops",
    "maskllm/pruning",
)
"""What decides the results of `maskllm finetune`."""
PERPLEXITY = tuple(f"maskllm/evaluation/{name}.py" for name in ("huggingface", "perplexity", "text", "windows"))
ZERO_SHOT = tuple(f"maskllm/evaluation/{name}.py" for name in ("lm_eval_tasks", "task_files", "task_sets", "zero_shot"))

C4, WIKITEXT = "{data}/c4-sample.train.json", "{data}/wikitext-2-raw.test.txt"
QUALITY_ROWS = {
    "masks": ("5e-4", "1e-3", "2e-3"),
    "weights-ce": ("6e-4", "1e-3", "2e-3"),
    "weights-kl": ("6e-4", "1e-3", "2e-3", "1e-3:1", "1e-3:2"),
    "weights-squarehead": ("6e-4", "1e-3", "2e-3"),
    "weights-ce-kl": ("6e-4", "1e-3", "2e-3"),
    "both-ce-kl": ("6e-4", "1e-3", "2e-3"),
    "both-kl": ("6e-4", "1e-3", "2e-3"),
    "cast": ("3e-4", "1e-3", "2e-3"),
    "fitted-kl": ("3e-4", "6e-4", "1e-3", "6e-4:1", "6e-4:2"),
}
"""The learning rates that are tried for each recipe of benchmarks/quality.py. `1e-3:1` is a rate with another seed."""
QUALITY_LONG_ROWS = ("weights-kl:1e-3", "fitted-kl:6e-4")
"""What is also trained with a million tokens."""

QUALITY_TESTED = (("weights-kl", "6e-4"), ("fitted-kl", "6e-4"))
TINY_QUALITY = "--tokens 64 --seq-length 32 --calibration-samples 2 --eval-seq-length 32 --eval-windows 1 --limit 2"


TINY_COMPRESSED = "--calibration-samples 2 --calibration-length 32 --seq-length 64 --max-windows 1 --chunk 32"
TINY_TRANSFER = "--general-iters 1 --domain-iters 1 --seq-length 32 --calibration-samples 2 --eval-seq-length 32 --eval-windows 1"


def _quality(row: str, minutes: float, tiny: str | None = None, *, long: bool = False) -> Measurement:
    """A row of the comparison of ways to train: `weights-kl:6e-4` is the measurement quality/weights-kl-6e-4, or long, ...-6e-4-1m."""
    command = (
        f"python -m benchmarks.quality --hf {{dense}} --train-data {C4} {{quickstart}}/corpus/train.jsonl --eval-data {WIKITEXT} "
        f"--tasks-data {{data}}/zero-shot --limit 200 --params-dtype bf16 --work {{work}} --row {row}"
    )
    name, tokens = ("-1m", " --tokens 1e6") if long else ("", "")
    sources = (*TRAINING, *PERPLEXITY, *ZERO_SHOT)
    return Measurement(f"quality/{row.replace(':', '-')}{name}", command + tokens, minutes, sources, tiny)


def _compressed(row: str, minutes: float, tiny: str | None = None, *, model: str = "learned") -> Measurement:
    """A row of the quality of compressed weights, of one of the quickstart's models: its learned masks, or its final model."""
    command = (
        f"python -m benchmarks.compressed_quality --dense {{dense}} --sparse {{quickstart}}/hf/{model} --calibration-data {C4} "
        f"--eval-data {WIKITEXT} --work {{work}}/{model} --row {row}"
    )
    sources = ("csrc/cpu", "maskllm/export", "maskllm/inference", "maskllm/ops", "maskllm/pruning", *PERPLEXITY)
    return Measurement(f"compressed-quality/{row if row == 'dense' else f'{model}-{row}'}", command, minutes, sources, tiny)


def _quickstart(name: str, minutes: float, options: str) -> Measurement:
    """A quickstart with other settings."""
    return Measurement(
        name,
        f"python -m maskllm quickstart --output {{work}}/{name.partition('/')[2]} {options}",
        minutes,
        QUICKSTART,
        output=f"{{work}}/{name.partition('/')[2]}/report.json",
    )


QUICKSTART = ("maskllm/quickstart", *TRAINING, *PERPLEXITY)
ZERO_SHOT_MODELS = " ".join(f"--model {{quickstart}}/hf/{name}" for name in ("dense", "sparsegpt", "learned", "final"))
ONE_SHOT = "python -m benchmarks.one_shot --hf {dense} --calibration " + f"{C4} --eval-data {WIKITEXT}"
STEP = "python -m benchmarks.training_step --load {quickstart}/megatron/dense"
SPARSE = "python -m benchmarks.sparse_linear"
SERVE = "python -m benchmarks.serve --work {work}"
RIVALS_SOURCES = (
    "benchmarks/models.py",
    "benchmarks/rival_programs.py",
    "csrc/cpu",
    "csrc/include",
    "maskllm/inference",
    "maskllm/ops",
)
SERVE_SOURCES = ("benchmarks/models.py", "csrc/cpu", "csrc/include", "examples/serve", "maskllm/inference", "maskllm/ops")
SPARSE_SOURCES = ("benchmarks/dense_loops.cpp", "csrc/cpu", "csrc/include", "maskllm/ops")
PRECISION = "python -m benchmarks.precision --hf {dense} --corpus " + C4
PRECISION_SOURCES = TRAINING
PLAN_SOURCES = ("benchmarks/trainings.py", "maskllm/planning", "maskllm/training", "maskllm/megatron")
PRUNE_MEMORY_SOURCES = ("maskllm/pruning",)
PRUNE_TIME_SOURCES = ("maskllm/pruning",)

_ALL = [
    Measurement("quickstart", "make quickstart", 20, QUICKSTART, output="{quickstart}/report.json"),
    *(
        _quickstart(
            f"quickstart-settings/{strength}-{rate}",
            20,
            f"--train-iters 30 --prior-strength {strength} --lr {rate} --min-lr {float(rate) / 10:g} --weights-train-iters 1",
        )
        for strength, rate in ((3, "1e-3"), (4, "2e-3"), (5, "1e-3"), (5, "2e-3"), (6, "2e-3"), (7, "1e-3"))
    ),
    _quickstart("quickstart-trainings/30-both-50", 25, "--train-iters 30 --weights-train-iters 50"),
    _quickstart("quickstart-trainings/30-weights-20", 20, "--train-iters 30 --weights-train weights --weights-train-iters 20"),
    Measurement(
        "zero-shot",
        f"python -m maskllm evaluate {ZERO_SHOT_MODELS} --tasks piqa arc_easy winogrande openbookqa "
        "--tasks-data {data}/zero-shot --limit 200",
        15,
        (*TRAINING, *ZERO_SHOT),
        tiny="--limit 2",
    ),
    *(_quality(row, 5) for row in ("dense", "magnitude", "wanda", "sparsegpt")),
    _quality("sparsegpt-fitted", 15),
    *(
        _quality(f"{recipe}:{rate}", 30, TINY_QUALITY if (recipe, rate) in QUALITY_TESTED else None)
        for recipe, rates in QUALITY_ROWS.items()
        for rate in rates
    ),
    *(_quality(row, 200, long=True) for row in QUALITY_LONG_ROWS),
    *(
        Measurement(
            f"mask-transfer/{domain}",
            f"python -m benchmarks.mask_transfer --hf {{dense}} --general {C4} --general-iters 16 --domain-iters 8 --eval-windows 8 "
            f"--processes 1 --domain {domain} {texts} --output {{work}}",
            25,
            (*TRAINING, *PERPLEXITY),
            tiny,
        )
        for domain, texts, tiny in (
            ("documentation", "{quickstart}/corpus/train.jsonl {quickstart}/corpus/held_out.jsonl", None),
            ("captions", "{data}/translation/train.de.gz {data}/translation/val.de.gz", TINY_TRANSFER),
        )
    ),
    *(
        Measurement(f"one-shot/seed-{seed}", f"{ONE_SHOT} --seed {seed}", 8, ("maskllm/pruning", *PERPLEXITY), tiny)
        for seed, tiny in ((0, "--samples 2 --seq-length 32 --windows 2 32"), (1, None), (2, None))
    ),
    Measurement("one-shot/4-samples", f"{ONE_SHOT} --samples 4", 6, ("maskllm/pruning", *PERPLEXITY)),
    Measurement(
        "prune-memory/small", "python -m benchmarks.prune_memory", 1, PRUNE_MEMORY_SOURCES, "--hidden 256 --mlp 512 --heads 2"
    ),
    Measurement(
        "prune-memory/llama-2-7b-layer",
        "python -m benchmarks.prune_memory --hidden 4096 --mlp 11008 --heads 32",
        15,
        PRUNE_MEMORY_SOURCES,
    ),
    Measurement(
        "prune-time/2-layers",
        "python -m benchmarks.prune --hf {dense} --layers 2 --methods wanda sparsegpt",
        10,
        PRUNE_TIME_SOURCES,
        "--layers 1 --samples 2 --seq-length 32",
    ),
    Measurement(
        "prune-time/all-layers",
        "python -m benchmarks.prune --hf {dense} --methods sparsegpt --sequential",
        25,
        PRUNE_TIME_SOURCES,
    ),
    Measurement(
        "masked-weight/smollm2-135m",
        "python -m benchmarks.masked_weight",
        5,
        ("csrc/cpu", "csrc/include", "maskllm/ops"),
        "--model tiny --repeats 1",
    ),
    Measurement(
        "masked-weight/llama-7b-cuda",
        "python -m benchmarks.masked_weight --device cuda --model llama-7b",
        5,
        ("csrc/cuda", "csrc/include", "maskllm/ops"),
        cuda=True,
    ),
    Measurement(
        "training-step/1-micro-batch",
        f"{STEP} --ways dense masks --sequences 1 --seq-length 2048",
        8,
        TRAINING,
        "--seq-length 32 --repeats 1",
    ),
    Measurement(
        "training-step/4-micro-batches",
        f"{STEP} --ways dense masks --sequences 4 --seq-length 512",
        8,
        TRAINING,
    ),
    Measurement(
        "training-step/teacher",
        f"{STEP} --ways dense-kl weights-kl both-kl --sequences 4 --seq-length 512",
        10,
        TRAINING,
    ),
    Measurement(
        "compress24/cpu",
        "python -m benchmarks.compress24 --device cpu",
        1,
        ("csrc/cpu", "maskllm/ops"),
        "--size 64",
    ),
    Measurement(
        "compress24/cuda",
        "python -m benchmarks.compress24 --device cuda",
        5,
        ("csrc/cuda", "maskllm/ops"),
        cuda=True,
    ),
    Measurement(
        "sparse-linear/few-rows",
        f"{SPARSE} --rows 1 2 4 8 16 17 32 64",
        3,
        SPARSE_SOURCES,
        "--rows 1 3 --seconds 0.01 --shape 512 256",
    ),
    Measurement("sparse-linear/many-rows", f"{SPARSE} --rows 65 128 256 512 1024 2048", 10, SPARSE_SOURCES),
    Measurement(
        "sparse-linear/cuda",
        f"{SPARSE} --device cuda --rows 1 2 4 8 16 17 64 256 1024 2048 4096 8192",
        3,
        ("csrc/cuda", "csrc/include", "maskllm/ops"),
        cuda=True,
    ),
    Measurement("sparse-linear/one-thread", f"env OMP_NUM_THREADS=1 {SPARSE} --rows --processor-time", 2, SPARSE_SOURCES),
    Measurement("serve/bf16", SERVE, 15, SERVE_SOURCES),
    Measurement("serve/int8", f"{SERVE} --bits 8", 15, SERVE_SOURCES),
    Measurement(
        "rivals",
        "python -m benchmarks.rivals --work {work}",
        40,
        RIVALS_SOURCES,
        "--ours '2:4 int8' --programs --rounds 1 --hidden 64 --mlp 128 --layers 2 --heads 4 --kv-heads 2 --vocabulary 320 "
        "--prompt-tokens 8 --new-tokens 4",
    ),
    Measurement(
        "preprocess/tokenizer-json",
        "python -m benchmarks.preprocess --input {quickstart}/corpus/train.jsonl --tokenizer {dense}",
        1,
        ("maskllm/data",),
        "--repeat 1 --workers 2",
    ),
    Measurement(
        "preprocess/tokenizer-model",
        "python -m benchmarks.preprocess --input {quickstart}/corpus/train.jsonl --tokenizer {data}/llama2-tokenizer.model",
        1,
        ("maskllm/data",),
    ),
    Measurement("plans", "python -m benchmarks.plans", 1, ("maskllm/planning",), ""),
    Measurement(
        "plan-memory/masks",
        "python -m benchmarks.plan_memory --hf {dense} --runs pipeline tensor low-precision",
        10,
        PLAN_SOURCES,
    ),
    Measurement(
        "plan-memory/weights",
        "python -m benchmarks.plan_memory --hf {dense} --runs weights weights-teacher both-teacher",
        10,
        PLAN_SOURCES,
        "--runs weights",
    ),
    Measurement(
        "precision/4-micro-batches",
        PRECISION,
        40,
        PRECISION_SOURCES,
        "--layers 1 --train-iters 2 --global-batch-size 2 --seq-length 32 --rows 0 5",
    ),
    Measurement(
        "precision/256-micro-batches",
        f"{PRECISION} --layers 2 --train-iters 6 --global-batch-size 256 --seq-length 16 --rows 0 1 5",
        30,
        PRECISION_SOURCES,
    ),
    Measurement(
        "kill-resume",
        "python -m benchmarks.kill_resume --cycles 200 --seed 2026 --train-iters 50",
        30,
        ("maskllm/checkpoints", "maskllm/training", "megatron_patches"),
    ),
    *(
        Measurement(
            f"model-load/{name}",
            f"python -m benchmarks.model_load {model} --work {{work}}",
            minutes,
            (
                "benchmarks/models.py",
                "csrc/cpu",
                "maskllm/export",
                "maskllm/huggingface",
                "maskllm/inference",
                "maskllm/ops",
            ),
            tiny,
        )
        for name, model, minutes, tiny in (
            ("smollm2-135m", "--sparse {quickstart}/hf/learned", 2, "--bits 16"),
            ("llama-1.1b", "--random", 6, None),
        )
    ),
    *(
        Measurement(
            f"compressed-tasks/{name}",
            f"python -m benchmarks.compressed_tasks {model} --work {{work}}",
            minutes,
            ("benchmarks/models.py", "csrc/cpu", "csrc/include", "maskllm/inference", "maskllm/ops"),
            tiny,
        )
        for name, model, minutes, tiny in (
            ("whisper-tiny.en", "--model {finetune}/whisper", 6, None),
            ("t5-multi30k", "--model {finetune}/t5", 6, None),
            ("mpt-documentation", "--model {finetune}/mpt", 6, None),
            ("t5-small", "--random t5-small", 6, "--patterns 16:64 --bits 16 --prompt-tokens 4 --new-tokens 2 --rounds 1"),
            ("mpt-1b", "--random mpt-1b", 25, None),
        )
    ),
    _compressed("dense", 3),
    *(
        _compressed(row, minutes, TINY_COMPRESSED if (row, model) == ("4-calibrated", "learned") else None, model=model)
        for model in ("learned", "final")
        for row, minutes in {"16": 3, "8-nearest": 6, "4-nearest": 6, "8-calibrated": 10, "4-calibrated": 10}.items()
    ),
    *(
        Measurement(f"{recipe}/{row}", finetuning.command(recipe, row), 30, (*FINETUNING, *finetuning.sources(recipe)))
        for recipe, content in finetuning.RECIPES.items()
        for row in content.rows
    ),
]


def _complete(one: Measurement) -> Measurement:
    """The measurement with the benchmark of its command among its sources, and with what makes the models that it measures."""
    sources = [f"benchmarks/{name}.py" for name in re.findall(r"-m benchmarks\.(\w+)", one.command)]
    sources += ["maskllm/quickstart"] if "{quickstart}/hf/" in one.command else []
    return replace(one, sources=(*sources, *one.sources))


MEASUREMENTS = {one.name: _complete(one) for one in _ALL}


def _group(name: str) -> tuple[str, ...]:
    """The measurements whose names begin with `name` and a slash."""
    return tuple(one for one in MEASUREMENTS if one.startswith(f"{name}/"))


TABLES = {
    table.name: table
    for table in (
        Table("quickstart", "The quickstart", ("quickstart",), tables.quickstart),
        Table("zero-shot", "The quickstart's models on zero-shot tasks", ("zero-shot",), tables.zero_shot),
        Table("model-load", "Loading compressed models", _group("model-load"), tables.model_load),
        Table("compressed-tasks", "Other compressed models", _group("compressed-tasks"), tables.compressed_tasks),
        Table("compressed-quality", "Compressed weights", _group("compressed-quality"), tables.compressed_quality),
        Table("quality", "Ways to train, at equal training tokens", _group("quality"), tables.quality),
        Table("one-shot", "One-shot masks", _group("one-shot"), tables.one_shot),
        Table("mask-transfer", "A general mask carried to domains", _group("mask-transfer"), tables.mask_transfer),
        Table("quickstart-settings", "Settings of a short run", _group("quickstart-settings"), tables.quickstart_settings),
        Table(
            "quickstart-trainings",
            "The quickstart's two trainings",
            ("quickstart", *_group("quickstart-trainings")),
            tables.quickstart_trainings,
        ),
        Table("precision", "Low precision, and one draw a step", _group("precision"), tables.precision),
        Table("masked-weight", "Drawing and applying every mask", _group("masked-weight"), tables.masked_weight),
        Table("training-step", "A training step", _group("training-step"), tables.training_step),
        Table("compress24", "2:4 compression", _group("compress24"), tables.compress24),
        Table(
            "sparse-linear",
            "Products with stored matrices: one row",
            ("sparse-linear/few-rows", "sparse-linear/one-thread"),
            tables.sparse_linear,
        ),
        Table(
            "sparse-linear-goals",
            "Products with stored matrices: goals",
            ("sparse-linear/few-rows", "sparse-linear/one-thread"),
            tables.sparse_linear_goals,
        ),
        Table(
            "sparse-linear-rows",
            "Products with stored matrices: more rows",
            ("sparse-linear/few-rows", "sparse-linear/many-rows"),
            tables.sparse_linear_rows,
        ),
        Table("sparse-linear-cuda", "Products with stored matrices on a GPU", ("sparse-linear/cuda",), tables.sparse_linear_cuda),
        Table("serve", "Served by vLLM", _group("serve"), tables.serve),
        Table("rivals", "Text generation beside other programs", ("rivals",), tables.rivals),
        Table("rivals-goals", "Text generation: goals", ("rivals",), tables.rivals_goals),
        Table("preprocess", "Pre-tokenization", _group("preprocess"), tables.preprocess),
        Table("prune-time", "The time of one-shot pruning", _group("prune-time"), tables.prune_time),
        Table("prune-memory", "The memory of one-shot pruning", _group("prune-memory"), tables.prune_memory),
        Table("plan-memory", "Plans compared with runs", _group("plan-memory"), tables.plan_memory),
        Table("plans", "Plans for LLaMA-2 7B", ("plans",), tables.plans, "Calculated"),
        Table("plans-training", "Plans for LLaMA-2 7B with trained weights", ("plans",), tables.plans_training, "Calculated"),
        Table("kill-resume", "Killed and resumed runs", ("kill-resume",), tables.kill_resume),
        *(
            Table(recipe, f"Sparse fine-tuning: {content.title}", _group(recipe), partial(finetuning.render, recipe))
            for recipe, content in finetuning.RECIPES.items()
        ),
    )
}
