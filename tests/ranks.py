"""Run programs in processes forked from a server that has imported PyTorch, Megatron Core, transformers and this project.

The imports take a fresh process five to eight seconds; a fork needs none. Each rank of each program is a new process with the environment
that torchrun gives to a rank. Tests of torchrun itself start it (`tests.training.conftest.Run`).

usage: python -m tests.ranks DESCRIPTOR     the server, with the descriptor of the socket that it listens on
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path

PRELOADED = (
    "maskllm.cli",
    "maskllm.cli.train_options",
    "maskllm.evaluation.huggingface",
    "maskllm.export.huggingface",
    "maskllm.inference.generation",
    "maskllm.pruning.megatron",
    "maskllm.training.loop",
    "maskllm.training.surviving.watchdog",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.nemotron.modeling_nemotron",
)
"""What the server imports beside Megatron."""
ROOT = Path(__file__).parents[1]
MONITOR_SECONDS = 0.1
GRACE_SECONDS = 30
"""torchrun waits this long between a rank's failure and SIGTERM to the others, and between SIGTERM and SIGKILL."""
_ON_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_TORCHRUN = ["-m", "torch.distributed.run"]
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Job:
    """A program that runs in one or more ranks. The methods and attributes are those of `subprocess.Popen`."""

    def __init__(
        self, server: str, words: Sequence[str], ranks: int | None, outputs: Sequence[int], environment: dict[str, str]
    ) -> None:
        """Start `python WORDS` (-m MODULE or FILE, and arguments) in this directory.

        Args:
            server: the path of the server's socket.
            ranks: processes to start as torchrun would; None for one process that is not part of a job.
            outputs: the descriptors of standard output and standard error, of each rank in turn or of all together.
        """
        request = {"words": list(words), "ranks": ranks, "directory": str(Path.cwd()), "environment": environment}
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect(server)
        socket.send_fds(self._connection, [json.dumps(request).encode()], outputs)
        try:
            started = json.loads(self._connection.recv(1 << 16) or "null")
        except ConnectionResetError:
            started = None
        assert started is not None, f"the server has ended:\n{Path(server).with_name('log').read_text()}"
        self.ranks: list[int] = started["ranks"]
        """The ranks' process IDs."""
        self.pid: int = started["launcher"] if ranks else self.ranks[0]
        """The process that starts the ranks and ends with them, as torchrun does; without torchrun the program itself."""
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, or None while the program runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit status. Raises TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.ranks, timeout)
            reply = self._connection.recv(1 << 16)
            self.returncode = int(reply) if reply else -signal.SIGKILL  # killed with its ranks
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to `pid`."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def pass_signal(self, number: int) -> None:
        """Have the launcher send a signal to the ranks, if it has not ended."""
        with contextlib.suppress(OSError):
            self._connection.send(str(number).encode())

    def kill(self) -> None:
        """Kill the ranks and wait for their end."""
        if self.returncode is None:
            self.pass_signal(signal.SIGKILL)
            self.wait(60)


class Pool:
    """Starts jobs. The server starts with the first one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen | None = None
        self._folder = Path()

    def __call__(self, ranks: int, module: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        """Run `python -m MODULE ARGUMENTS` in each of `ranks` ranks; `stderr` of the result is what they print, rank after rank."""
        words = ["-m", module, *map(str, arguments)]
        with contextlib.ExitStack() as stack:
            logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
            job = self.start(ranks, words, [log.fileno() for log in logs for _ in range(2)])
            stack.callback(job.kill)
            status = job.wait(900)
            output = ""
            for log in logs:
                log.seek(0)
                output += log.read()
        assert not check or status == 0, output
        return subprocess.CompletedProcess(words, status, "", output)

    def start(self, ranks: int | None, words: Sequence[str], outputs: Sequence[int], **environment: str) -> Job:
        """Start a `Job` with one thread a rank, no GPU and further variables of its environment."""
        return Job(self._socket(), words, ranks, outputs, os.environ | _ON_CPU | environment)

    def programs(self, folder: Path) -> Path:
        """Write stand-ins for python, maskllm and torchrun, which start jobs, into `folder`; returns the path of python's.

        The real torchrun starts its ranks through it if PYTHON_EXEC names that path.
        """
        for name, first in {"python": [], "maskllm": ["-m", "maskllm"], "torchrun": _TORCHRUN}.items():
            (folder / name).write_text(
                f"#!{sys.executable} -ISE\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                f"from tests.ranks import python\npython({self._socket()!r}, {first} + sys.argv[1:])\n"
            )
            (folder / name).chmod(0o755)
        return folder / "python"

    def close(self) -> None:
        """End the server, and with it all jobs."""
        if self._server is not None:
            self._server.kill()
            self._server.wait(60)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _socket(self) -> str:
        if self._server is None:
            self._folder = Path(tempfile.mkdtemp(prefix="ranks"))
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, (self._folder / "log").open("w") as log:
                listener.bind(str(self._folder / "socket"))
                listener.listen()
                self._server = subprocess.Popen(
                    [sys.executable, "-m", "tests.ranks", str(listener.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[listener.fileno()],
                    preexec_fn=heed_interrupts,
                    cwd=ROOT,
                    env=os.environ | _ON_CPU,
                )
        assert self._server.poll() is None, (self._folder / "log").read_text()
        return str(self._folder / "socket")


def heed_interrupts() -> None:
    """For `preexec_fn`: give a child the default handlers of SIGINT and SIGHUP.

    A child inherits ignored signals: a shell's background job ignores SIGINT, and a program started by nohup ignores SIGHUP.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def python(server: str, words: list[str]) -> None:
    """Be `python WORDS`: a job of one process, or of as many ranks as `words` tell torchrun to start."""
    _end_with_parent()
    ranks = None
    if words[:2] == _TORCHRUN:
        program = words.index("-m", 2)
        options = " ".join(words[2:program]).replace("=", " ").split()
        ranks, words = int(options[options.index("--nproc-per-node") + 1]), words[program:]
    passed_on = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # The program may run, and this process be sent a signal for it, before there is a `job` to pass it on.
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
    job = Job(server, [word for word in words if word != "-u"], ranks, [1, 2], dict(os.environ))
    for number in passed_on:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: job.pass_signal(received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    _end(job.wait())


def main(descriptor: int) -> None:
    """Import everything, then serve until killed. A rank leaves `serve` and runs its program."""
    import megatron_patches

    _end_with_parent()
    megatron_patches.import_megatron()
    for module in PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the garbage collector of a fork would otherwise write to, and so copy, the memory that it shares with the server
    words = serve(socket.socket(fileno=descriptor))
    status = _run(words)
    # The interpreter's own end takes half a second for all the modules; multiprocessing ends its forks like this, too.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    _end(status)


def _end(status: int) -> None:
    """End this process with an exit status, or by signal -`status` if it is negative."""
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _run(words: list[str]) -> int:
    """Run `python WORDS` in this process. Returns the exit status as `subprocess` does: negative for a signal."""
    try:
        if words[0] == "-m":
            sys.argv[1:] = words[2:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[1:] = words[1:]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def serve(listener: socket.socket) -> list[str]:
    """Fork a launcher for each job. Returns, in each rank that a launcher has forked, the words of its program."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that launchers leave no zombies
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _launch(connection)
        connection.close()


def _launch(connection: socket.socket) -> list[str]:
    """Fork the ranks and wait for their end. Returns only in a rank."""
    _end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 64)
    request = json.loads(message)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    store = socket.create_server(("127.0.0.1", 0))
    launcher, ranks, run_id = os.getpid(), request["ranks"] or 1, uuid.uuid4().hex
    processes: list[int] = []
    for rank in range(ranks):
        processes.append(os.fork())
        with contextlib.suppress(PermissionError):  # both sides do it, because either may be first
            os.setpgid(processes[-1], 0)
        if processes[-1] == 0:
            _end_with_parent(launcher)
            connection.close()
            for number, output in zip((1, 2), outputs[2 * rank :] or outputs, strict=False):
                os.dup2(output, number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
            for output in outputs:
                os.close(output)
            if request["ranks"] is not None:
                os.environ.update(_environment(rank, ranks, store.getsockname()[1], run_id))
            store.close()
            return request["words"]
    for output in outputs:
        os.close(output)
    from torch.distributed import TCPStore

    # After the forks, because it starts a thread. The ranks' connections wait in the listening socket.
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, master_listen_fd=store.detach())
    connection.send(json.dumps({"launcher": launcher, "ranks": processes}).encode())
    status = _wait_for_ranks(connection, processes)
    connection.send(str(status if request["ranks"] is None else int(status != 0)).encode())
    del kept
    os._exit(0)


def _wait_for_ranks(connection: socket.socket, processes: list[int]) -> int:
    """Wait for the ranks as torchrun does: after the first failure the others get SIGTERM. Returns that failure's status, or 0.

    A signal to this process, or a signal's number from the connection, goes to each rank's process group. The ranks die when the
    connection closes.
    """
    running = {os.pidfd_open(process): process for process in processes}
    first_failure, deadline = 0, None

    def send(number: int) -> None:
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: send(received))
    while running:
        ready, _, _ = select.select([connection, *running], [], [], deadline and max(0.0, deadline - time.monotonic()))
        if connection in ready:
            message = connection.recv(64)
            send(int(message or signal.SIGKILL))
            if not message:
                os._exit(1)
        for descriptor in running.keys() & set(ready):
            _, status = os.waitpid(running.pop(descriptor), 0)
            first_failure = first_failure or os.waitstatus_to_exitcode(status)
        if first_failure and deadline is None:
            time.sleep(MONITOR_SECONDS)
            send(signal.SIGTERM)
            deadline = time.monotonic() + GRACE_SECONDS
        elif deadline is not None and time.monotonic() >= deadline:
            send(signal.SIGKILL)
            deadline = time.monotonic() + GRACE_SECONDS
    return first_failure


def _environment(rank: int, ranks: int, port: int, run_id: str) -> dict[str, str]:
    """The variables that torchrun sets in a rank on one machine (https://docs.pytorch.org/docs/stable/elastic/run.html)."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends for any reason (prctl(2)); end now if `parent` has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
