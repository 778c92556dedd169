"""The comparison with other programs: their models are made once, they are measured in turn, and the table compares equal bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import rivals, tables
from benchmarks.models import made
from benchmarks.results import Result
from maskllm.errors import MaskLLMError

STAND_IN = """#!{python}
import json, pathlib, sys
if sys.argv[1] == "-c":
    raise SystemExit("llama_cpp" in sys.argv[2])
verb, program, *others = sys.argv[2:]
if verb == "convert":
    pathlib.Path(others[2]).mkdir()
elif program == "broken":
    raise SystemExit("no such model")
else:
    prompt = json.loads(pathlib.Path(others[1]).read_text())
    assert len(prompt) == 8 and others[2:] == ["--new-tokens", "4", "--threads", {threads!r}]
    print("a warning")
    print(json.dumps(dict(first_token_seconds=0.5, tokens_per_second=20.0, file_bytes=10, versions=dict(other="1.2"), more=1)))
"""
SIZES = {"hidden": 64, "mlp": 128, "layers": 1, "heads": 4, "kv-heads": 2, "vocabulary": 320, "prompt-tokens": 8, "new-tokens": 4}


@pytest.fixture
def python(tmp_path) -> Path:
    """An interpreter that plays the environment of the other programs."""
    file = tmp_path / "python"
    file.write_text(STAND_IN.format(python=sys.executable, threads=str(rivals.torch.get_num_threads())))
    file.chmod(0o755)
    return file


def test_programs_get_the_model_and_the_table_compares_equal_bits(tmp_path, python, monkeypatch, capsys):
    real = rivals.run

    def run(words):
        """Our own commands, without their processes."""
        if "maskllm" not in words:
            return real(words)
        if "compress" in words:
            return words[-1].mkdir() or ""
        bits = Path(words[words.index("--model") + 1]).name.rpartition("-")[2]
        rate = {"dense": 5.0, "16": 10.0, "8": 30.0, "4": 40.0}[bits]
        numbers = {"first_token_seconds": 0.25, "tokens_per_second": rate, "file_bytes": 9, "dtype": "bfloat16"}
        words[-1].write_text(json.dumps({"results": [numbers]}))
        return ""

    monkeypatch.setattr(rivals, "run", run)
    output = tmp_path / "result.json"
    arguments = ["--work", str(tmp_path / "work"), "--python", str(python), "--rounds", "2"]
    arguments += [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    rivals.main([*arguments, "--json", str(output)])
    printed = capsys.readouterr().out
    assert f"llama.cpp: left out; {python} has no module llama_cpp" in printed and printed.count("making") == 7
    result = json.loads(output.read_text())
    assert [len(rounds) for rounds in result["rows"].values()] == [2] * 7
    lines = tables.rivals({"rivals": Result(result, None, None, None, {}, None, None, None)})
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-2]] for line in lines if line.startswith("|")}
    assert cells["ctranslate2 int8"] == ["0", "0.50", "20.00", "1.50"]
    assert cells["openvino int4"][3] == "2.00"
    assert cells["dense bf16"] == ["0", "0.25", "5.00", "2.00"] and cells["2:4 int8"][3] == "-"
    assert lines[-1] == "other 1.2."
    lines = tables.rivals_goals({"rivals": Result(result, None, None, None, {}, None, None, None)})
    reached = dict([cell.strip() for cell in line.split("|")[1:3]] for line in lines[2:])
    assert list(reached.values()) == [
        "2.00",
        "6.00",
        "1.00",
        "1.00",
        "1.00",
        "1.50 (ctranslate2), 1.50 (openvino)",
        "2.00 (openvino)",
    ]
    rivals.main([*arguments, "--programs", "openvino"])
    assert "making" not in capsys.readouterr().out
    with pytest.raises(MaskLLMError, match=r"holds another model: num_hidden_layers 1 \(wanted 2\)"):
        rivals.main([*arguments, "--layers", "2"])


def test_a_program_that_fails_is_told_with_its_message(tmp_path, python):
    with pytest.raises(MaskLLMError, match="exit status 1\nno such model"):
        rivals.run([python, rivals.RIVALS, "measure", "broken"])
    with pytest.raises(MaskLLMError, match="exit status 1"):
        made(tmp_path / "model", lambda path: path.mkdir() or rivals.run([python, "", "measure", "broken"]))
    assert not (tmp_path / "model").exists()


def test_the_tokenizer_for_converters_has_every_token(tmp_path):
    from sentencepiece import SentencePieceProcessor

    file = tmp_path / "tokenizer.model"
    rivals.write_sentencepiece(file, 320)
    processor = SentencePieceProcessor(model_file=str(file))
    assert processor.vocab_size() == 320 and processor.id_to_piece(300) == "word300" and processor.unk_id() == 0
