"""The tables of README and docs, as Markdown lines from results. Each function takes the results that there are, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.results import Result
from maskllm.evaluation.comparison import Comparison
from maskllm.evaluation.tables import comparison_table
from maskllm.markdown import markdown_table
from maskllm.quickstart.report import RESULT_COLUMNS, result_cells
from maskllm.reporting.formatting import UNKNOWN, format_bytes, format_perplexity, format_seconds, format_share

Results = Mapping[str, Result]


def quickstart(found: Results) -> list[str]:
    """The models of a quickstart, and what all steps took."""
    report = found["quickstart"].result
    settings, evaluation = report["settings"], report["evaluation"]
    tokens = settings["train_iters"] * settings["global_batch_size"] * settings["seq_length"]
    return [
        *markdown_table(RESULT_COLUMNS, list(map(result_cells, report["results"])), left=1),
        "",
        f"The masks start from {settings['prior']}'s and are learned in {settings['train_iters']} steps, {tokens:,} tokens in all.",
        f"Then weights and masks are trained in {settings['weights_train_iters']} steps of the same size.",
        f"Perplexity is that of {evaluation['windows']} held-out windows of {evaluation['seq_length']} tokens.",
        f"All steps together took {format_seconds(report['seconds'])} and at most {format_bytes(report['peak_memory_bytes'])} in all "
        "processes.",
    ]


def quickstart_settings(found: Results) -> list[str]:
    """Settings of mask learning: the loss of the winning masks on the validation split."""
    cells = []
    for name in found:
        report = found[name].result
        losses = [line["loss_winner"] for line in report["metrics"] if line.get("kind") == "validation"]
        settings = report["settings"]
        cells.append([f"{settings['prior_strength']:g}", f"{settings['lr']:g}", f"{losses[-1]:.2f}"])
    return markdown_table(["prior strength", "learning rate", "validation loss"], sorted(cells), left=0)


def quickstart_trainings(found: Results) -> list[str]:
    """What the second training adds to the first."""
    cells = []
    for name in found:
        settings = found[name].result["settings"]
        models = {model["name"]: model for model in found[name].result["results"]}
        masks = f"{settings['train_iters']} steps"
        for model, then in (
            ("learned", "nothing"),
            ("final", f"{settings['weights_train']}, {settings['weights_train_iters']} steps"),
        ):
            if model in models:
                closed = format_share(models[model]["gap_closed"])
                cells.append([masks, then, format_perplexity(models[model]["perplexity"]), closed])
    unique = list(dict.fromkeys(map(tuple, cells)))
    return markdown_table(["masks", "then", "perplexity", "gap closed"], unique, left=2)


def quality(found: Results) -> list[str]:
    """The ways to train, by tokens, then by perplexity. Zero-shot columns stand there if a row has tasks."""
    rows = sorted((result.result for result in found.values()), key=lambda row: (row["tokens"], -row["perplexity"]))
    one_shot = {row["recipe"]: row["perplexity"] for row in rows if not row["rate"]}
    dense, prior = one_shot.get("dense"), one_shot.get("sparsegpt")
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"] or {}))
    cells = []
    for row in rows:
        closed = None if None in (dense, prior) else (prior - row["perplexity"]) / (prior - dense)
        scores = [_accuracy((row["tasks"] or {}).get(task)) for task in tasks]
        cells.append(
            [
                row["recipe"],
                row["rate"] or UNKNOWN,
                str(row["seed"] or UNKNOWN),
                f"{row['tokens']:,}",
                format_perplexity(row["perplexity"]),
                format_share(closed),
                *scores,
            ]
        )
    return markdown_table(
        ["recipe", "learning rate", "seed", "training tokens", "perplexity", "gap closed", *(f"{task}, acc" for task in tasks)],
        cells,
        left=1,
    )


def compressed_tasks(found: Results) -> list[str]:
    """Whisper, T5 and MPT: the best of several rounds, and the rate beside the dense model's."""
    cells = []
    for result in found.values():
        report = result.result
        best = {label: max(rows, key=lambda row: row["texts_per_second"]) for label, rows in report["rows"].items()}
        for label, row in best.items():
            audio = row["audio_seconds"]
            cells.append(
                [
                    report["model"],
                    label,
                    f"{row['weight_bytes'] / 1e6:.1f}",
                    f"{1e3 * row['first_token_seconds']:.1f}",
                    f"{row['tokens_per_second']:.1f}",
                    f"{row['texts_per_second']:.3g}",
                    f"{1 / row['texts_per_second'] / audio:.3g}" if audio else "",
                    f"{row['texts_per_second'] / best['dense']['texts_per_second']:.2f}",
                ]
            )
    header = [
        "model",
        "weights",
        "MB in memory",
        "first token, ms",
        "tokens/s",
        "texts/s",
        "s a second of audio",
        "texts/s over dense",
    ]
    return markdown_table(header, cells, left=2)


def compressed_quality(found: Results) -> list[str]:
    """The quickstart's 2:4 models as `maskllm compress` stores them."""
    cells = []
    for measurement, result in found.items():
        row = result.result
        model = measurement.partition("/")[2].partition("-")[0]
        bits, _, how = row["row"].partition("-")
        how = {"nearest": ", rounded to the nearest", "calibrated": ", calibrated"}.get(how, "")
        cells.append(
            [
                model,
                "16 bits" if bits == "dense" else f"2:4, {bits} bits{how}",
                f"{row.get('matrix_bytes', 1):.3f}",
                format_perplexity(row["perplexity"]),
                format_perplexity(row.get("perplexity_in_chunks")),
            ]
        )
    header = ["model", "weights", "bytes of the blocks' matrices", "perplexity", "perplexity with activations of 8 bits"]
    return markdown_table(header, cells, left=2)


def model_load(found: Results) -> list[str]:
    """Size, time to load and peak memory of compressed models."""
    cells = [
        [
            measurement.partition("/")[2],
            "dense bf16" if name == "dense" else f"2:4, {name} bits",
            f"{row['file_bytes'] / rows['dense']['file_bytes']:.3f}",
            f"{row['block_bytes'] / rows['dense']['block_bytes']:.3f}",
            format_seconds(row["load_seconds"]),
            f"{row['load_seconds'] / row['read_seconds']:.2f}",
            f"{row['peak_bytes'] / row['weight_bytes']:.2f}",
        ]
        for measurement, result in found.items()
        for rows in [result.result]
        for name, row in rows.items()
    ]
    header = ["model", "weights", "file", "blocks in memory", "load", "load / reading the file", "peak memory / weights"]
    return markdown_table(header, cells, left=2)


def zero_shot(found: Results) -> list[str]:
    """Models side by side on tasks, and compared with the first one."""
    report = found["zero-shot"].result
    models = report["models"]
    tasks = list(models[0]["tasks"])
    cells = [
        [task, str(models[0]["tasks"][task]["items"]), *(_accuracy(model["tasks"][task]["metrics"].get("acc")) for model in models)]
        for task in tasks
    ]
    cells += [[name, "", *(_accuracy(model["means"][name]) for model in models)] for name in models[0]["means"]]
    compared = [(model["label"], [Comparison(**item) for item in model["against_reference"]]) for model in models[1:]]
    limit = f"The first {report['limit']} items of each task only." if report["limit"] else "All items of each task."
    return [
        *markdown_table(["task", "items", *(model["label"] for model in models)], cells, left=1),
        "",
        f"`acc` in percent ± standard error, zero examples in a prompt. {limit}",
        f"lm-eval {report['versions']['lm-eval']}, {models[0]['dtype']}; weights (SHA-256) "
        + ", ".join(f"{model['label']} `{model['weights_sha256'][:16]}`" for model in models)
        + ".",
        "",
        *comparison_table(report["reference"], compared),
        "",
        "[evaluation.md](evaluation.md) explains the columns.",
    ]


def one_shot(found: Results) -> list[str]:
    """One-shot masks of SmolLM2 by calibration text."""
    methods = {
        "dense": "dense",
        "magnitude": "magnitude",
        "wanda": "Wanda",
        "sparsegpt": "SparseGPT, mask only",
        "sparsegpt, updated": "SparseGPT, weights updated",
    }
    rows = [result.result for result in found.values()]
    cells = [
        [
            f"{row['samples']} x {row['seq_length']}",
            str(row["seed"]),
            *(format_perplexity(row["perplexity"][method]) for method in methods),
        ]
        for row in rows
    ]
    return markdown_table(["calibration tokens", "seed", *methods.values()], cells, left=1)


def mask_transfer(found: Results) -> list[str]:
    """Masks of domains, and how far they are from where they started."""
    cells = [
        [
            row["domain"],
            row["mask"],
            format_perplexity(row["perplexity"]),
            *(f"{row[key]:.2%}" if key in row else "" for key in ("blocks_unlike_start", "blocks_unlike_general")),
            f"{row['bytes'] / 1e6:.2f} MB" if "bytes" in row else "",
        ]
        for result in found.values()
        for row in result.result["rows"]
    ]
    header = ["domain", "mask", "perplexity", "changed from its start", "changed from the general mask", "mask file"]
    size = next(iter(found.values())).result["general_bytes"]
    return [*markdown_table(header, cells, left=2), "", f"The general mask's own file has {size / 1e6:.2f} MB."]


def precision(found: Results) -> list[str]:
    """What low precision and other draws change, beside another seed."""
    cells = []
    for result in found.values():
        for row in result.result["rows"]:
            options = row["options"]
            seed = options[options.index("--seed") + 1] if "--seed" in options else "1"
            words = [word for word in options if word not in ("--seed", seed)]
            cells.append(
                [
                    str(result.result["global_batch_size"]),
                    f"`{' '.join(words)}`" if words else "none",
                    seed,
                    f"{row['loss_winner']:.3f}",
                    f"{row['masks_equal']:.1%}",
                ]
            )
    header = ["micro-batches", "options", "seed", "validation loss with the winners", "mask entries equal to the first row's"]
    return markdown_table(header, cells, left=2)


def masked_weight(found: Results) -> list[str]:
    """The kernels of the masked weight against operators, and against a copy."""
    cells = []
    for result in found.values():
        row = result.result
        seconds, shares = row["seconds"], row["share_of_copy_bandwidth"]
        cells.append(
            [
                f"{row['model']}, {row['masked_weights'] / 1e6:.0f} M, {row['instruction_set']}",
                *(f"{_three_digits(1e3 * seconds[name])} ms" for name in ("forward", "backward")),
                *(f"{row[f'{name}_over_kernels']:.1f}" for name in ("reference", "operators")),
                *(UNKNOWN if shares is None else f"{shares[name]:.0%}" for name in ("forward", "backward")),
            ]
        )
    header = [
        "masked weights",
        "kernels, forward",
        "kernels, backward",
        "reference over kernels",
        "operators over kernels",
        "forward, share of copy bandwidth",
        "backward, share",
    ]
    return markdown_table(header, cells, left=1)


def training_step(found: Results) -> list[str]:
    """Ways to train against a step that trains the dense model's weights."""
    ways = {
        "dense": "dense weights",
        "masks": "masks",
        "dense-kl": "dense weights, teacher",
        "masks-kl": "masks, teacher",
        "weights-kl": "weights under a fixed mask, teacher",
        "both": "weights and masks",
        "both-kl": "weights and masks, teacher",
    }
    cells = []
    for result in found.values():
        row = result.result
        batches = f"{row['micro_batches']} x {row['tokens'] // row['micro_batches']} tokens"
        for way, seconds in sorted(row["seconds"].items(), key=lambda item: item[1]):
            dense = row["seconds"].get("dense-kl" if way.endswith("-kl") else "dense")
            cells.append([batches, ways[way], f"{seconds:.1f} s", UNKNOWN if dense is None else f"{seconds / dense:.2f}"])
    return markdown_table(["micro-batches", "trained", "time of a step", "of the dense step"], cells, left=2)


def compress24(found: Results) -> list[str]:
    """2:4 compression, and the layers that multiply with it on a GPU."""
    cells, layers = [], []
    for name, result in found.items():
        row = result.result["compression"]
        times = (f"{_three_digits(1e3 * row[key])} ms" for key in ("compress", "decompress", "clone"))
        cells.append(
            [name.partition("/")[2], f"{result.result['size']} x {result.result['size']}", *times, f"{row['bytes_of_dense']:.1%}"]
        )
        layers += result.result["layers"]
    lines = markdown_table(["device", "bf16 matrix", "compress", "decompress", "clone", "size, of dense"], cells, left=2)
    if layers:
        tokens = list(dict.fromkeys(row["tokens"] for row in layers))
        speedups = {(row["layer"], row["tokens"]): row["speedup"] for row in layers}
        names = list(dict.fromkeys(row["layer"] for row in layers))
        rows = [[name, *(f"{speedups[name, count]:.2f}" for count in tokens)] for name in names]
        lines += ["", "The dense layer's time over that of `Sparse24Linear`, by tokens:", ""]
        lines += markdown_table(["layer of LLaMA", *map(str, tokens)], rows, left=1)
    return lines


def sparse_linear(found: Results) -> list[str]:
    """One row of activations: bytes a second, and torch's dense bf16 over each."""
    cells = []
    for name, result in found.items():
        rows = result.result["one_row"]
        dense = rows["dense bf16 (torch)"]["seconds"]
        for weights, row in rows.items():
            cells.append(
                [
                    name.partition("/")[2],
                    weights,
                    f"{1e3 * row['seconds']:.2f}",
                    f"{row['bytes_a_second'] / 1e9:.1f}",
                    f"{row['share_of_read']:.0%}",
                    f"{row['in_cache_bytes_a_second'] / 1e9:.1f}",
                    f"{dense / row['seconds']:.2f}" if weights != "read" else "",
                ]
            )
    header = ["run", "weights", "ms", "GB/s", "share of the read loop", "in cache, GB/s", "torch's dense bf16 over it"]
    return markdown_table(header, cells, left=2)


def sparse_linear_goals(found: Results) -> list[str]:
    """The goals of the products of one row, and what the runs reach."""

    def times(fast: str, slow: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda rows: f"{rows[slow]['seconds'] / rows[fast]['seconds']:.2f}"

    def bandwidth(rows: Mapping[str, Any]) -> str:
        row = rows["2:4 bf16"]
        return f"{row['share_of_read']:.0%}, {row['bytes_a_second'] / row['in_cache_bytes_a_second']:.0%}"

    dense = "dense bf16 (torch)"
    goals = {
        "2:4 bf16 at least 1.6 times torch's bf16": times("2:4 bf16", dense),
        "2:4 bf16 at 85 % of the read bandwidth, or of the loop's own limit in the cache if that is lower": bandwidth,
        "2:4 int8 at least 1.4 times dense int8": times("2:4 int8", "dense int8 (VNNI loop)"),
        "2:4 int4 at least 4 times torch's bf16": times("2:4 int4, groups of 128", dense),
        "1:4 bf16 at least 2.8 times torch's bf16": times("1:4 bf16", dense),
    }
    cells = [[goal, *(reached(result.result["one_row"]) for result in found.values())] for goal, reached in goals.items()]
    return markdown_table(["goal", *(name.partition("/")[2] for name in found)], cells, left=1)


def sparse_linear_rows(found: Results) -> list[str]:
    """Torch's dense bf16 over stored matrices, by rows of activations."""
    rows = [row for result in found.values() for row in result.result["rows"]]
    layouts = list(rows[0]["ratio"])[1:]
    cells = [
        [str(row["rows"]), _three_digits(1e3 * row["seconds"]["dense"]), *(f"{row['ratio'][layout]:.2f}" for layout in layouts)]
        for row in rows
    ]
    return markdown_table(["rows", "dense bf16, ms", *layouts], cells, left=0)


def sparse_linear_cuda(found: Results) -> list[str]:
    """Torch's dense bf16 over stored matrices on a GPU, by rows of activations, with the share of a copy's bandwidth."""
    dense, cells = "dense bf16 (torch)", []
    for result in found.values():
        for row in result.result["rows"]:
            times, shares = row["seconds"], row["share_of_copy"]
            ratios = [f"{times[dense] / times[name]:.2f} ({shares[name]:.0%})" for name in times if name != dense]
            cells.append([str(row["rows"]), f"{_three_digits(1e6 * times[dense])} ({shares[dense]:.0%})", *ratios])
        layouts = [name for name in result.result["rows"][0]["seconds"] if name != dense]
    return markdown_table(["rows", "dense bf16, µs", *layouts], cells, left=0)


def serve(found: Results) -> list[str]:
    """A compressed checkpoint served by vLLM, against the dense one."""
    cells = []
    for result in found.values():
        report = result.result
        for line in report["results"]:
            small, dense = line["servers"]
            cells.append(
                [
                    f"{report['bits']} bits a kept weight",
                    str(line["requests"]),
                    f"{dense['tokens_per_second']:.2f}",
                    f"{small['tokens_per_second']:.2f}",
                    f"{small['tokens_per_second'] / dense['tokens_per_second']:.2f}",
                    f"{dense['seconds_to_first']:.2f}",
                    f"{small['seconds_to_first']:.2f}",
                ]
            )
    first = next(iter(found.values())).result
    compiled = "torch.compile" if first["compiled"] else "`--enforce-eager`"
    return [
        *markdown_table(
            [
                "compressed",
                "requests at once",
                "dense, tokens/s",
                "compressed, tokens/s",
                "ratio",
                "dense, first token, s",
                "compressed",
            ],
            cells,
            left=1,
        ),
        "",
        f"A LLaMA-shaped model with random 2:4 weights: {first['layers']} layers, hidden {first['hidden']}, FFN {first['ffn']}; "
        f"{first['dtype']}, vLLM {first['vllm']}, {compiled}, {first['threads']} threads, prompts of {first['prompt_tokens']} tokens, "
        f"{first['new_tokens']} new ones. Both servers run and take turns; the median of {first['repeats']}.",
    ]


def rivals(found: Results) -> list[str]:
    """Compressed models beside other programs: the best round of each, and how much faster 2:4 is at the same bits."""
    report = found["rivals"].result
    best, first = _best_rounds(report["rows"])
    cells = []
    for name, row in best.items():
        ours = best.get(f"2:4 {name.split()[-1]}", row)
        same = row is ours
        loads = [one["load"] for one in report["rows"][name]]
        cells.append(
            [
                name,
                f"{row['file_bytes'] / 1e6:,.0f}",
                f"{first[name]:.2f}",
                f"{row['tokens_per_second']:.2f}",
                UNKNOWN if same else f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f}",
                f"{min(loads):g} to {max(loads):g}",
            ]
        )
    versions = {package: version for row in best.values() for package, version in row.get("versions", {}).items()}
    settings = report["settings"]
    return [
        *markdown_table(
            ["program and weights", "weights, MB", "first token, s", "tokens/s", "2:4 of the same bits over it", "load"],
            cells,
            left=1,
        ),
        "",
        f"A LLaMA-shaped model with random weights: {settings['layers']} layers, hidden {settings['hidden']}, FFN {settings['mlp']}; one "
        f"prompt of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones, {settings['threads']} threads; the best of "
        f"{len(next(iter(report['rows'].values())))} rounds.",
        *([f"{', '.join(f'{package} {version}' for package, version in versions.items())}."] if versions else []),
    ]


def rivals_goals(found: Results) -> list[str]:
    """The goals of text generation, and what the best rounds reach."""
    best, first = _best_rounds(found["rivals"].result["rows"])

    def rate(ours: str, other: str = "dense bf16") -> str:
        if not {ours, other} <= best.keys():
            return UNKNOWN
        return f"{best[ours]['tokens_per_second'] / best[other]['tokens_per_second']:.2f}"

    def wait(ours: str) -> str:
        return f"{first[ours] / first['dense bf16']:.2f}" if {ours, "dense bf16"} <= first.keys() else UNKNOWN

    def rest(kind: str) -> str:
        others = [name for name in best if name.endswith(f" {kind}") and not name.startswith("2:4 ")]
        return ", ".join(f"{rate(f'2:4 {kind}', name)} ({name.removesuffix(f' {kind}')})" for name in others) or UNKNOWN

    cells = [
        ["2:4 bf16: tokens a second at least 1.5 times dense bf16's", rate("2:4 bf16")],
        ["2:4 int8: tokens a second at least 2.4 times dense bf16's", rate("2:4 int8")],
        *(
            [f"2:4 {kind}: time to the first token at most 1.1 times dense bf16's", wait(f"2:4 {kind}")]
            for kind in ("bf16", "int8", "int4")
        ),
        *([f"2:4 {kind}: tokens a second more than every {kind} program's", rest(kind)] for kind in ("int8", "int4")),
    ]
    return markdown_table(["goal", "ratio"], cells, left=1)


def _best_rounds(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[dict[str, Mapping[str, Any]], dict[str, float]]:
    """The round with the most tokens a second and the shortest time to the first token (seconds), by program and weights."""
    best = {name: max(rounds, key=lambda one: one["tokens_per_second"]) for name, rounds in rows.items()}
    return best, {name: min(one["first_token_seconds"] for one in rounds) for name, rounds in rows.items()}


def preprocess(found: Results) -> list[str]:
    """Pre-tokenization against one document at a time."""
    cells = []
    for result in found.values():
        row = result.result
        speeds = row["megabytes_a_second"]
        cells.append(
            [
                row["tokenizer"],
                f"{row['tokens'] / 1e6:.2f} M",
                f"{speeds['one_document_at_a_time']:.2f} MB/s",
                f"{speeds['maskllm']:.2f} MB/s ({row['library']})",
                f"{speeds['maskllm'] / speeds['one_document_at_a_time']:.1f}",
            ]
        )
    return markdown_table(["tokenizer", "tokens", "one document at a time", "`maskllm preprocess`", "ratio"], cells, left=1)


def prune_time(found: Results) -> list[str]:
    """Pruning against the dense forward passes alone, and SparseGPT's solve against algorithm 1, if it was measured."""
    cells = []
    for result in found.values():
        row = result.result
        size = f"{row['layers']} layers, {row['samples']} x {row['seq_length']} tokens"
        for method, times in row["prune"].items():
            cells.append(
                [
                    method,
                    size,
                    *(format_seconds(times[key]) for key in ("seconds", "solve_seconds")),
                    *(UNKNOWN if times[key] is None else f"{times[key]:.1f}" for key in ("ratio", "processor_ratio")),
                ]
            )
    header = ["method", "size", "time", "of it solving", "over the dense forward passes", "in processor time"]
    lines = markdown_table(header, cells, left=2)
    for result in found.values():
        solve = result.result["solve_seconds"]
        if solve:
            lines += [
                "",
                f"SparseGPT's solve of all matrices of {result.result['layers']} layers takes {format_seconds(solve['ours'])}; algorithm 1 "
                f"as the paper writes it takes {solve['algorithm_1'] / solve['ours']:.1f} times as long.",
            ]
    return lines


def prune_memory(found: Results) -> list[str]:
    """The peak of pruning's memory, calculated and measured."""
    cells = [
        [
            name.partition("/")[2],
            f"h = {result.result['hidden']}, f = {result.result['mlp']}",
            *(f"{result.result[key] / 2**20:.1f} MiB" for key in ("solving", "host", "measured")),
        ]
        for name, result in found.items()
    ]
    return markdown_table(["layer", "shape", "calculated while solving", "calculated on the host", "measured"], cells, left=2)


def plan_memory(found: Results) -> list[str]:
    """Peak memory of runs, and what `maskllm plan` expects."""
    cells = [
        [
            str(row["ranks"]),
            f"`{' '.join(row['options'])}`",
            *(f"{row[key] / 1e9:.2f}" for key in ("measured", "planned")),
            f"{row['measured'] / row['planned']:.2f}",
        ]
        for result in found.values()
        for row in result.result["rows"].values()
    ]
    return markdown_table(["processes", "options", "measured GB a process", "planned", "measured / planned"], cells, left=2)


def plans(found: Results) -> list[str]:
    """Plans by options."""
    rows = found["plans"].result["memory"]
    cells = [[str(row["gpus"]), f"`{row['options']}`" if row["options"] else "none", f"{row['bytes'] / 1e9:.1f}"] for row in rows]
    return markdown_table(["GPUs", "options", "GB a GPU"], cells, left=2)


def plans_training(found: Results) -> list[str]:
    """Plans by what is trained."""
    result = found["plans"].result
    cells = [
        [
            f"`{row['options']}`",
            *(f"{row[key] / 1e9:.1f}" for key in ("bytes", "lean_bytes")),
            f"{row['seconds']:.1f}",
            f"{row['checkpoint_bytes'] / 1e9:.0f}",
        ]
        for row in result["training"]
    ]
    header = [
        "options",
        "GB a GPU",
        "the same, `--sequence-parallel` and selective recomputation of `mlp masked_weight`",
        "seconds a step",
        "GB of a checkpoint",
    ]
    many = result["training_on_many"]
    more = f"On {many['gpus']} GPUs with `{many['options']}` it is {many['bytes'] / 1e9:.1f} GB a GPU."
    return [*markdown_table(header, cells, left=1), "", f"The seconds are those of the first column. {more}"]


def kill_resume(found: Results) -> list[str]:
    """What was killed, and what differed."""
    row = found["kill-resume"].result
    cells = [
        ["kills", str(row["cycles"])],
        ["before the first step", str(row["killed_before_a_step"])],
        ["of one rank alone", str(row["killed_one_rank"])],
        ["after which there was a newer checkpoint", str(row["killed_after_a_save"])],
        [f"runs of {row['steps']} steps that reached their end", str(row["runs_compared"])],
        ["tensors in each", str(row["tensors_in_each"])],
        ["tensors that differ from the uninterrupted run", str(len(row["tensors_that_differ"]))],
    ]
    return markdown_table([f"{row['ranks']} ranks", "number"], cells, left=1)


def _accuracy(score: Mapping[str, float | None] | None) -> str:
    """An accuracy in percent, with its standard error."""
    if score is None:
        return UNKNOWN
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def _three_digits(value: float) -> str:
    """0.123, 1.23, 12.3, 123, 1,230."""
    return f"{float(f'{value:.3g}'):,g}"


def measurement_rows(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The table of all measurements in docs/results.md."""
    header = ["measurement", "date", "machine", "load", "versions", "commit", "code", "command, and what else to know"]
    return markdown_table(header, rows, left=len(header))
