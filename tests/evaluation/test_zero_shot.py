"""Zero-shot tasks on a tiny model and local files: lm-eval's command line, sets, masks, several models, interruptions, errors."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

import maskllm.evaluation.zero_shot as zero_shot
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.evaluation.candidates import Candidate, named
from maskllm.evaluation.comparison import accuracy, compare
from maskllm.evaluation.huggingface import block_weights
from maskllm.evaluation.lm_eval_tasks import Row, _check_runs, load_suite
from maskllm.evaluation.task_files import describes_itself, local_config
from maskllm.evaluation.task_sets import NAMED, TaskSet, expand
from maskllm.evaluation.zero_shot import ModelScores, Score, TaskScores, evaluate_tasks
from maskllm.huggingface.mask_file import write_mask_file
from maskllm.huggingface.weights_hash import weights_sha256
from tests.evaluation.conftest import words

ITEMS = 24


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch) -> Path:
    """No test reads or writes the user's caches."""
    folder = tmp_path_factory.getbasetemp() / "caches"
    monkeypatch.setenv("MASKLLM_CACHE_DIR", str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    return folder


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tasks_data(tmp_path_factory) -> Path:
    """Three tasks: `questions` with choices, `contexts` with contexts, and `piqa` with the fields of its data set on the hub."""
    folder = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)

    def some(count: int) -> str:
        return words(count, generator.randrange(10**6))

    write_lines(
        folder / "questions.jsonl",
        [
            {"query": f"Question: {some(4)}\n", "choices": [some(1), some(2), some(3)], "gold": generator.randrange(3)}
            for _ in range(ITEMS)
        ],
    )
    write_lines(
        folder / "contexts.jsonl",
        [{"context_options": [some(3), some(3)], "continuation": some(2), "gold": generator.randrange(2)} for _ in range(ITEMS)],
    )
    write_lines(
        folder / "piqa.jsonl",
        [{"goal": some(4), "sol1": some(3), "sol2": some(4), "label": generator.randrange(2)} for _ in range(ITEMS)],
    )
    return folder


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def report_of(tmp_path: Path, *arguments: object) -> dict:
    assert run(*arguments, "--json", tmp_path / "report.json") == 0
    return json.loads((tmp_path / "report.json").read_text())


@pytest.fixture
def refused(capfd):
    """Runs the verb, which must refuse, and returns the error's line."""

    def call(*arguments: object) -> str:
        assert run(*arguments) == 1
        return capfd.readouterr().err.partition("maskllm evaluate: error: ")[2].splitlines()[0]  # progress may stand around it

    return call


@pytest.mark.slow
def test_numbers_equal_lm_evals_own_command_line(model_directory, tasks_data, tmp_path, capsys):
    """The configurations here are written by hand; piqa's includes lm-eval's own."""
    import lm_eval

    included = tmp_path / "include"
    included.mkdir()
    files = {name: {"data_files": {split: str(tasks_data / f"{name}.jsonl")}} for name, split in
             (("questions", "test"), ("contexts", "test"), ("piqa", "validation"))}  # fmt: skip
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    common = {"dataset_path": "json", "output_type": "multiple_choice", "test_split": "test"}
    question = "{{query[:-1]}}\nAnswer:"
    own = {
        "questions": common
        | {"doc_to_text": question, "doc_to_choice": "choices", "doc_to_target": "gold", "metric_list": metrics},
        "contexts": common
        | {
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
            "metric_list": metrics[:1],
        },
        "piqa": {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / "piqa" / "piqa.yaml"),
            "dataset_path": "json",
            "training_split": None,
        },
    }
    for name, config in own.items():
        (included / f"{name}.yaml").write_text(json.dumps({"task": f"own_{name}", "dataset_kwargs": files[name], **config}))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model_directory},dtype=float32",
    ]
    command += ["--tasks", "own_questions,own_contexts,own_piqa", "--include_path", str(included), "--device", "cpu"]
    command += ["--batch_size", "8", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (output,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(output.read_text())
    options = ["--params-dtype", "fp32", "--device", "cpu", "--batch-size", "8"]
    report = report_of(
        tmp_path, "--model", model_directory, "--tasks", "questions", "contexts", "piqa", "--tasks-data", tasks_data, *options
    )
    ours = report["models"][0]["tasks"]
    table = capsys.readouterr().out
    for name in own:
        found = theirs["results"][f"own_{name}"]
        assert ours[name]["items"] == theirs["n-samples"][f"own_{name}"]["effective"] == ITEMS
        assert set(ours[name]["metrics"]) == ({"acc"} if name == "contexts" else {"acc", "acc_norm"})
        for metric, score in ours[name]["metrics"].items():
            assert score == {"value": found[f"{metric},none"], "stderr": found[f"{metric}_stderr,none"]}
            assert f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f}" in table
    assert 0 < ours["questions"]["metrics"]["acc"]["value"] < 1


def test_the_report_says_what_was_run(model_directory, tasks_data, tmp_path, capsys):
    arguments = ["--model", model_directory, "--tasks", "questions", "contexts", "--tasks-data", tasks_data, "--limit", 5]
    report = report_of(tmp_path, *arguments, "--params-dtype", "fp32")
    (model,) = report["models"]
    assert report["versions"]["lm-eval"] == zero_shot.metadata.version("lm-eval") and report["limit"] == 5
    assert model["weights_sha256"] == weights_sha256(model_directory) and model["dtype"] == "float32" and model["window"] == 64
    assert model["bos"] == "BOS" and model["against_reference"] is None
    assert report["files"]["questions"]["rows"] == ITEMS
    tasks = model["tasks"]
    assert {name: (task["items"], task["shots"]) for name, task in tasks.items()} == {"questions": (5, 0), "contexts": (5, 0)}
    mean = sum(task["metrics"]["acc"]["value"] for task in tasks.values()) / 2
    assert model["means"]["mean of 2 tasks"]["value"] == mean
    out = capsys.readouterr().out
    assert "The papers' tables print acc." in out and "The first 5 items of each task only." in out
    assert model["weights_sha256"][:16] in out and f"lm-eval {report['versions']['lm-eval']}" in out and "window 64; BOS" in out


def test_a_masked_model_beside_the_dense_one_and_its_perplexity(model_directory, tasks_data, text_file, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    torch.manual_seed(1)
    masks = {name: torch.rand(weight.shape) < 0.5 for name, weight in block_weights(model).items()}
    for name, weight in block_weights(model).items():
        weight *= masks[name]
    sparse = shutil.copytree(model_directory, tmp_path / "sparse")
    model.save_pretrained(sparse)
    write_mask_file(tmp_path / "m.npz", masks.items())
    models = ["--model", model_directory, "--model", model_directory, "--mask", tmp_path / "m.npz", "--model", sparse]
    tasks = ["--tasks", "questions", "contexts", "--tasks-data", tasks_data, "--data", text_file, "--seq-length", 32]
    report = report_of(tmp_path, *models, *tasks, "--params-dtype", "fp32")
    dense, masked, saved = report["models"]
    name = model_directory.name
    assert [found["label"] for found in report["models"]] == [name, f"{name} + m.npz", "sparse"] and report["reference"] == name
    assert masked["tasks"] == saved["tasks"] != dense["tasks"]
    assert masked["perplexity"]["perplexity"] == pytest.approx(saved["perplexity"]["perplexity"], rel=1e-9)
    assert masked["perplexity"]["perplexity"] != dense["perplexity"]["perplexity"]
    assert masked["weights_sha256"] == dense["weights_sha256"] != saved["weights_sha256"] and masked["mask_sha256"]
    assert dense["zeros"] == 0 and masked["zeros"] == saved["zeros"] > 0.4
    assert masked["against_reference"] == saved["against_reference"]
    for item in masked["against_reference"][:2]:
        before, after = (found["tasks"][item["row"]]["metrics"]["acc"]["value"] for found in (dense, masked))
        assert item["difference"] == after - before == pytest.approx((item["gained"] - item["lost"]) / ITEMS)
        assert item["recovered"] == after / before
        assert item["p_value"] == binomtest(item["gained"], item["gained"] + item["lost"]).pvalue
    out = capsys.readouterr().out
    assert f"acc minus {name}" in out and f"sparse: perplexity {saved['perplexity']['perplexity']:.4f}" in out


def scores_of(correct: dict[str, list[int]], groups: dict[str, list[str]] | None = None) -> ModelScores:
    arrays = {name: np.array(values, dtype=np.float64) for name, values in correct.items()}
    tasks = {name: TaskScores(len(values), 0, None, 0, {"acc": Score(values.mean(), 0.1)}) for name, values in arrays.items()}
    for name, leaves in (groups or {}).items():
        everything = np.concatenate([arrays[leaf] for leaf in leaves])
        tasks[name] = TaskScores(len(everything), None, None, 0, {"acc": Score(everything.mean(), 0.1)})
    return ModelScores("m", "m", None, None, None, None, "float32", "cpu", 0.0, 64, "BOS", "8", 1.0, tasks, arrays)


def test_the_paired_test_equals_resampling():
    """Of the mean and of a group that counts items: the standard error is that of resampled items of each task."""
    generator = np.random.default_rng(0)
    before = {"a": generator.integers(0, 2, 40), "b": generator.integers(0, 2, 200)}
    after = {name: np.where(generator.random(len(values)) < 0.3, 1 - values, values) for name, values in before.items()}
    rows = [
        Row("a", "task", {"a": 1.0}),
        Row("g", "group", {"a": 40 / 240, "b": 200 / 240}),
        Row("mean of a, b", "mean", {"a": 0.5, "b": 0.5}, ("a", "b")),
    ]
    groups = {"g": ["a", "b"]}
    reference, model = scores_of(before, groups), scores_of(after, groups)
    for row, found in zip(rows, compare(reference, model, rows), strict=True):
        samples = np.zeros(20_000)
        for leaf, weight in row.weights.items():
            change = model.correct[leaf] - reference.correct[leaf]
            samples += weight * change[generator.integers(0, len(change), (20_000, len(change)))].mean(1)
        assert found.stderr == pytest.approx(samples.std(), rel=0.03)
        assert found.difference == pytest.approx(samples.mean(), abs=3 * found.stderr / 141)
        assert found.difference == accuracy(model, row).value - accuracy(reference, row).value
    assert [found.test for found in compare(reference, model, rows)] == ["McNemar, exact", "paired, normal", "paired, normal"]
    same = compare(reference, reference, rows)
    assert [(found.p_value, found.recovered, found.gained, found.lost) for found in same] == [(1.0, 1.0, 0, 0)] * 3


def test_an_interrupted_evaluation_goes_on(model_directory, tasks_data, tmp_path, caches, monkeypatch, capfd):
    arguments = [
        "--model",
        model_directory,
        "--tasks",
        "questions",
        "contexts",
        "--tasks-data",
        tasks_data,
        "--params-dtype",
        "fp32",
    ]
    whole = report_of(tmp_path, *arguments)["models"][0]["tasks"]
    assert not list((caches / "evaluate").iterdir()), "the answers of a finished evaluation stay on disk"
    calls: list[int] = []
    original = zero_shot.HFLM._model_call

    def counting(self, inputs, *rest, **options):
        if len(calls) == 6 and not resumed:
            raise KeyboardInterrupt
        calls.append(len(inputs))
        return original(self, inputs, *rest, **options)

    resumed = False
    monkeypatch.setattr(zero_shot.HFLM, "_model_call", counting)
    assert run(*arguments) == 130
    assert len(calls) == 6 and len(list((caches / "evaluate").glob("*.db"))) == 1
    resumed = True
    assert report_of(tmp_path, *arguments)["models"][0]["tasks"] == whole
    assert sum(calls) == ITEMS * 5, "answers were computed twice"
    assert not list((caches / "evaluate").iterdir())


def test_prompts_that_are_longer_than_the_context_are_counted(model_directory, tasks_data, tmp_path, capsys):
    rows = [json.loads(line) for line in (tasks_data / "questions.jsonl").read_text().splitlines()]
    for place in (3, 7):
        rows[place]["query"] = f"Question: {words(80, place)}"
    write_lines(tmp_path / "questions.jsonl", rows)
    report = report_of(tmp_path, "--model", model_directory, "--tasks", "questions", "--tasks-data", tmp_path)
    assert report["models"][0]["tasks"]["questions"]["truncated"] == 2
    assert f"questions: 2 of {ITEMS} items are longer than the window of 64 tokens" in capsys.readouterr().out


def test_the_room_for_an_answer_that_the_model_writes_counts():
    harness = SimpleNamespace(tok_encode=str.split, max_length=10, max_gen_toks=4)
    samples = [{"arguments": [(words(6, 0), {"until": []})]}, {"arguments": [(words(7, 0), {})]}]
    assert zero_shot._truncated(harness, samples) == 1
    assert zero_shot._truncated(harness, [{"arguments": [(words(6, 0), {"max_gen_toks": 5})]}]) == 1


def test_every_model_gets_the_same_examples(model_directory, tmp_path, monkeypatch, capsys):
    """lm-eval's sampler goes on from where it was; its command line runs one model."""
    generator = random.Random(0)
    for name, rows in (("short", 24), ("short.train", 40)):
        write_lines(
            tmp_path / f"{name}.jsonl",
            [
                {"query": words(2, generator.randrange(10**6)), "choices": list("abc"), "gold": generator.randrange(3)}
                for _ in range(rows)
            ],
        )
    monkeypatch.setitem(NAMED, "two examples", TaskSet("two examples", ("short",), 2))
    models = ["--model", model_directory, "--model", model_directory, "--tasks", "two examples", "--tasks-data", tmp_path]
    prompts = []
    original = zero_shot.HFLM.loglikelihood
    monkeypatch.setattr(
        zero_shot.HFLM,
        "loglikelihood",
        lambda self, requests, **options: prompts.append([one.args for one in requests]) or original(self, requests, **options),
    )
    monkeypatch.setattr(zero_shot, "_cache_file", lambda key: None)
    first, second = report_of(tmp_path, *models)["models"]
    assert prompts[0] == prompts[1] and prompts[0][0][0].count("\n\n") == 2
    assert first["tasks"] == second["tasks"] and first["tasks"]["short"]["shots"] == 2


@pytest.mark.slow
def test_tasks_that_cannot_be_run_are_refused():
    with pytest.raises(MaskLLMError, match="--tasks mmlu mmlu_astronomy: both have the task mmlu_astronomy; use two calls"):
        load_suite(expand(["mmlu", "mmlu_astronomy"]), None, None, Path())
    for kind, message in (("UNSAFE_CODE", "humaneval: runs code"), ("MULTIMODAL", "humaneval: has images or sound")):
        with pytest.raises(MaskLLMError, match=message):
            _check_runs({"tasks": {"humaneval": SimpleNamespace(**{kind: True})}})


def test_sets():
    assert set(NAMED["all9"].members) == {*NAMED["maskllm7"].members, *NAMED["wanda7"].members}
    assert len(NAMED["all9"].members) == 9
    assert len(NAMED["maskllm7"].members) == len(NAMED["wanda7"].members) == 7
    loose, wanda = expand(["rte", "wanda7", "piqa", "rte"])
    assert loose == TaskSet("2 tasks", ("rte", "piqa")) and wanda is NAMED["wanda7"]
    with pytest.raises(MaskLLMError, match="--tasks mmlu_5shot: asks for mmlu with another number of examples than --tasks mmlu"):
        load_suite(expand(["mmlu", "mmlu_5shot"]), None, None, Path())


def test_a_named_set_from_files_and_a_task_of_two_sets(tmp_path):
    """RACE and WinoGrande are read by lm-eval's functions, HellaSwag by its preprocessing, the others by templates."""
    letters = {"choices": {"text": ["x", "y", "z", "w"], "label": ["A", "B", "C", "D"]}, "answerKey": "C"}
    problems = [{"question": "Why?", "options": ["x", "y", "z", "w"], "answer": "B"}]
    rows = {
        "hellaswag": {"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "endings": ["d", "e", "f", "g"], "label": "1"},
        "race": {"article": "a", "problems": repr(problems)},
        "piqa": {"query": "Question: a", "choices": ["x", "y"], "gold": 1},
        "winogrande": {"sentence": "the _ is b", "option1": "x", "option2": "y", "answer": "2"},
        "arc_easy": {"question": "a", **letters},
        "ARC-challenge": {"question": "a", **letters},
        "openbook_qa": {"question_stem": "a", **letters},
        "boolq": {"passage": "a", "question": "b", "label": 1},
        "rte": {"sentence1": "a", "sentence2": "b", "label": 0},
    }
    for name, row in rows.items():
        write_lines(tmp_path / f"{name}.jsonl", [row, row])
    (tmp_path / "scratch").mkdir()
    suite = load_suite(expand(["maskllm7", "wanda7"]), tmp_path, None, tmp_path / "scratch")
    assert set(suite.loaded["tasks"]) == set(NAMED["all9"].members)
    assert [row.name for row in suite.rows if row.kind == "mean"] == ["mean of maskllm7", "mean of wanda7"]
    assert suite.rows[-1].weights == dict.fromkeys(NAMED["wanda7"].members, pytest.approx(1 / 7))
    prompts = {}
    for name, task in suite.loaded["tasks"].items():
        assert task.get_config("num_fewshot") == 0
        task.build_all_requests(rank=0, world_size=1)
        prompts[name] = [instance.args for instance in task.instances if instance.doc_id == 0]
    assert prompts["arc_challenge"] == [("Question: a\nAnswer:", f" {letter}") for letter in "xyzw"]
    assert prompts["piqa"] == [("Question: a\nAnswer:", " x"), ("Question: a\nAnswer:", " y")]
    assert prompts["openbookqa"][0] == ("a", " x")
    assert prompts["winogrande"] == [("the x", " is b"), ("the y", " is b")]
    assert prompts["hellaswag"][1] == ("c: a B", " e")
    assert prompts["boolq"] == [("a\nQuestion: b?\nAnswer:", " no"), ("a\nQuestion: b?\nAnswer:", " yes")]
    assert prompts["race"][3] == ("Article: a\n\nWhy?", " w")


def test_mmlu_has_five_examples_and_counts_items(model_directory, tmp_path):
    import lm_eval

    subjects = [path.stem for path in (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")]
    assert len(subjects) == 57
    for place, name in enumerate(subjects):
        items = [{"question": words(1, place), "choices": list("wxyz"), "answer": place % 4}] * (1 + (place < 3))
        write_lines(tmp_path / f"{name}.jsonl", items)
        write_lines(tmp_path / f"{name}.dev.jsonl", [{"question": f"e{n}", "choices": list("wxyz"), "answer": 1} for n in range(5)])
    (tmp_path / "scratch").mkdir()
    suite = load_suite(expand(["mmlu_5shot"]), tmp_path, None, tmp_path / "scratch")
    group = next(row for row in suite.rows if row.name == "mmlu")
    assert group.kind == "group" and sorted(set(group.weights.values())) == [1 / 60, 2 / 60]
    found = zero_shot.evaluate_tasks(Candidate("m", str(model_directory)), suite, limit=1)
    assert found.tasks["mmlu"].shots == 5 and found.tasks["mmlu"].items == 57
    task = suite.loaded["tasks"][subjects[0]]
    task.build_all_requests(rank=0, world_size=1)
    assert task.instances[0].args[0].count("Answer:") == 6 and "e4" in task.instances[0].args[0]
    (tmp_path / f"{subjects[0]}.dev.jsonl").unlink()
    with pytest.raises(MaskLLMError, match=rf"has no {subjects[0]}\.dev\.jsonl, which the 5 examples in each prompt"):
        load_suite(expand(["mmlu_5shot"]), tmp_path, None, tmp_path / "scratch")
    plain = load_suite(expand(["mmlu"]), tmp_path, None, tmp_path / "scratch")
    assert {task.get_config("num_fewshot") for task in plain.loaded["tasks"].values()} == {0}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", r"questions\.jsonl: is empty; wanted JSON lines with query, choices, gold"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": \n', r"questions\.jsonl:2: not JSON"),
        ("[1]\n", r"questions\.jsonl:1: a JSON array, wanted an object"),
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 0}\n\n{"query": "a", "gold": 0}\n',
            r"questions\.jsonl:3: has no 'choices'",
        ),
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 2}\n',
            r"questions\.jsonl:1: 'gold' is 2; wanted the index of one of 2 choices",
        ),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}\n', r"questions\.jsonl:1: 'gold' is true"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}\n', r"questions\.jsonl:1: 'choices' is \[\"b\", \"\"\]"),
        ('{"query": 5, "choices": ["b", "c"], "gold": 0}\n', r"questions\.jsonl:1: 'query' is 5; wanted a string"),
        ('{"context_options": ["b", "c"], "continuation": " ", "gold": 0}\n', r"questions\.jsonl:1: 'continuation' is \" \""),
    ],
)
def test_a_malformed_file_is_named_with_its_line(contents, message, tmp_path):
    (tmp_path / "questions.jsonl").write_text(contents)
    with pytest.raises(MaskLLMError, match=message):
        load_suite(expand(["questions"]), tmp_path, None, tmp_path)


def test_files_that_are_missing_or_of_another_data_set(tmp_path):
    with pytest.raises(MaskLLMError, match=r"--tasks-data .*nowhere: no such folder"):
        load_suite(expand(["piqa"]), tmp_path / "nowhere", None, tmp_path)
    wanted = r"has no piqa\.jsonl for the task piqa; wanted JSON lines with the rows of the data set baber/piqa, split validation"
    with pytest.raises(MaskLLMError, match=wanted + r" \(goal, sol1, sol2, label\), or with query, choices, gold"):
        load_suite(expand(["piqa"]), tmp_path, None, tmp_path)
    write_lines(tmp_path / "piqa.jsonl", [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}, {"goal": "a", "sol1": "b"}])
    with pytest.raises(MaskLLMError, match=r"piqa\.jsonl:2: has no 'sol2'; wanted goal, sol1, sol2, label in every line"):
        load_suite(expand(["piqa"]), tmp_path, None, tmp_path)


def test_a_file_with_a_data_sets_own_fields_needs_lm_evals_configuration(tasks_data, tmp_path):
    assert [describes_itself(tasks_data, name) for name in ("questions", "contexts", "piqa", "none")] == [True, True, False, False]
    write_lines(tmp_path / "own.jsonl", [{"question": "a"}])
    with pytest.raises(
        MaskLLMError, match=r"own\.jsonl:1: has the fields question; wanted query, choices, gold or context_options"
    ):
        local_config(tmp_path, "own", None, None, None)


def test_a_data_set_with_lists_of_right_answers_is_lm_evals(tmp_path):
    """AGIEval's rows have query, choices and gold as well."""
    original = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}", "test_split": "test"}
    write_lines(tmp_path / "agieval_aqua_rat.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": [0, 1]}])
    config, found = local_config(tmp_path, "agieval_aqua_rat", original, tmp_path / "aqua-rat.yaml", None)
    assert found.form == "lm-eval" and config["include"] == str(tmp_path / "aqua-rat.yaml")


def test_data_that_wants_the_network_says_which_file_would_do(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MaskLLMError) as caught:
        load_suite(expand(["piqa", "arc_easy"]), None, None, Path())
    message = str(caught.value)
    assert message.startswith("--tasks piqa arc_easy: lm-eval cannot load a task: ") and "baber/piqa" in message
    assert "piqa.jsonl (baber/piqa, split validation), arc_easy.jsonl (allenai/ai2_arc ARC-Easy, split test)" in message
    assert message.endswith("and name it with --tasks-data")


@pytest.mark.slow
def test_an_unknown_task_has_close_names(refused, model_directory, tasks_data, tmp_path):
    line = refused("--model", model_directory, "--tasks", "question", "--tasks-data", tasks_data)
    assert line.startswith("--tasks question: lm-eval ") and "the closest names are questions" in line


def test_a_tokenizer_without_bos_or_without_anything_to_begin_with(model_directory, tasks_data, tmp_path, refused):
    directory = shutil.copytree(model_directory, tmp_path / "model")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = ["--model", directory, "--tasks", "questions", "--tasks-data", tasks_data, "--limit", 2]
    assert "its tokenizer has neither a BOS nor an EOS token" in refused(*arguments)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    assert report_of(tmp_path, *arguments)["models"][0]["bos"].startswith("no BOS (the tokenizer has none")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>"}))
    assert report_of(tmp_path, *arguments)["models"][0]["bos"] == "no BOS (the tokenizer adds none)"


def test_a_model_that_overflows_has_no_answers(model_directory, tasks_data, tmp_path, refused):
    """The largest of several NaN is the first one, which would be an accuracy."""
    directory = shutil.copytree(model_directory, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.lm_head.weight.data[3] = torch.inf
    model.save_pretrained(directory)
    line = refused("--model", directory, "--tasks", "questions", "--tasks-data", tasks_data, "--limit", 2)
    assert line.startswith("model: questions: the likelihood of an answer to item 0 is ")


def test_out_of_memory_says_what_to_do(model_directory, tasks_data, tmp_path, refused, monkeypatch):
    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(zero_shot.HFLM, "_model_call", fails)
    arguments = ["--model", model_directory, "--tasks", "questions", "--tasks-data", tasks_data, "--limit", 2]
    assert "out of memory with --batch-size 4 on cpu; give a smaller one (or auto)" in refused(*arguments, "--batch-size", 4)


def test_the_batch_size_shrinks_until_it_fits(model_directory, tasks_data, tmp_path, monkeypatch):
    original = zero_shot.HFLM._model_call

    def small(self, inputs, *rest, **options):
        if len(inputs) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, inputs, *rest, **options)

    monkeypatch.setattr(zero_shot.HFLM, "_model_call", small)
    arguments = ["--model", model_directory, "--tasks", "questions", "--tasks-data", tasks_data, "--batch-size", "auto"]
    rule, _, size = report_of(tmp_path, *arguments)["models"][0]["batch_size"].partition(": ")
    assert rule == "auto" and 8 <= int(size) <= 16


def test_options_that_do_not_fit_together(refused, model_directory, tasks_data, text_file, tmp_path, monkeypatch):
    tasks = ["--tasks", "questions", "--tasks-data", tasks_data]
    assert "found neither --data nor --tasks" in refused("--model", "m")
    assert refused("--model", "m", "--data", text_file).startswith("--data: wanted --seq-length too")
    assert refused("--model", "m", "--seq-length", 8, *tasks).startswith("--seq-length: wanted --data too")
    assert "--tasks-data, --limit: apply to --tasks only" in refused(
        "--model", "m", "--data", text_file, "--seq-length", 8, "--limit", 3
    )
    assert "m.npz: stands before every --model" in refused("--mask", "m.npz", "--model", "a", "--model", "b", *tasks)
    assert "--mask n.npz: --model a has m.npz already" in refused("--model", "a", "--mask", "m.npz", "--mask", "n.npz", *tasks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--tasks: runs in one process" in refused("--model", "m", *tasks)


def test_labels_differ():
    found = named(["runs/a/hf", "runs/b/hf", "runs/b/hf", "x"], {2: "masks/m.npz"}, {2: "base.npz"})
    assert [candidate.label for candidate in found] == ["hf (1)", "hf (2)", "hf + m.npz", "x"]
    assert found[2].mask_base == "base.npz" and found[3].mask is None


def test_a_megatron_checkpoint_is_exported(model_directory, tasks_data, tmp_path, capsys):
    assert main(["convert", "--hf", str(model_directory), "--output", str(tmp_path / "dense")]) == 0
    assert main(["prune", "--load", str(tmp_path / "dense"), "--output", str(tmp_path / "pruned"), "--method", "magnitude"]) == 0
    tasks = ["--tasks", "questions", "--tasks-data", tasks_data, "--params-dtype", "fp32"]
    dense = report_of(tmp_path, "--model", model_directory, *tasks)["models"][0]
    found = report_of(tmp_path, "--load", tmp_path / "dense", *tasks)["models"][0]
    assert found["tasks"] == dense["tasks"] and found["weights_sha256"] == dense["weights_sha256"]
    assert found["label"] == "dense" and found["model"] == str(tmp_path / "dense")
    pruned = report_of(tmp_path, "--load", tmp_path / "pruned", *tasks)["models"][0]
    assert pruned["zeros"] >= 0.5 and pruned["weights_sha256"] != dense["weights_sha256"]


def test_a_call_from_python(model_directory, tasks_data, tmp_path):
    suite = load_suite(expand(["questions"]), tasks_data, 3, tmp_path)
    scores = evaluate_tasks(Candidate("a model", str(model_directory)), suite, limit=3, dtype=torch.float32, device="cpu")
    assert scores.correct["questions"].mean() == scores.tasks["questions"].metrics["acc"].value
    assert len(scores.correct["questions"]) == 3
