"""Processes for tests: `run` and `Popen` as in `subprocess`, but forked from one that has the libraries loaded.

Starting Python with torch, Diffusers and Transformers takes seconds, a fork takes hundredths. A test gives the command
that it would give to `subprocess` (`sys.executable` with `-c`, `-m` or a script), the folder and the environment, and
gets a process that can be waited for, signalled and killed. Of this package nothing is loaded before the fork: every
process imports it anew. A fork differs from a new process in that all share one seed of Python's hashes, and in that
variables which Python or torch read when they start do nothing; for what depends on such, use `subprocess`.

With `REAL_PROCESSES=1` in the environment every process is a new one.
"""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = sys.platform == "linux" and not os.environ.get("REAL_PROCESSES")
# Where the server takes the Hub and its cache to be, until a fork puts its own in their place.
HUB = {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": "/nonexistent/hub-of-the-fork-server"}


@cache
def _server():
    """Starts this test process's server, which ends when the socket to it closes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
            cwd=ROOT, env={**os.environ, **HUB, "OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return ours


class _Fork:
    """What the tests use of `subprocess.Popen`, for a fork of the server."""

    def __init__(self, command, cwd, env):
        self.args, self.returncode = command, None
        self._said = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 - closed by `communicate`
        self._status, status = os.pipe()
        request = {"words": command[1:], "cwd": str(cwd), "environment": env}
        files = [*(file.fileno() for file in self._said), status]
        socket.send_fds(_server(), [json.dumps(request).encode()], files)
        os.close(status)
        self.pid = self._read()

    def _read(self):
        answer = os.read(self._status, 4)
        if not answer:
            raise RuntimeError("the fork server of the tests has ended")
        return struct.unpack("i", answer)[0]

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._read()
            os.close(self._status)
        return self.returncode

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self.wait(timeout)
        texts = []
        for file in self._said:
            with file:
                file.seek(0)
                texts.append(file.read().decode())
        return tuple(texts)


def Popen(command, *, cwd=ROOT, env=None):  # noqa: N802 - as the class of `subprocess`
    """Starts a process; what it writes is captured, for `communicate`."""
    command = [str(word) for word in command]
    environment = {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"}
    if FORKS:
        return _Fork(command, cwd, environment)
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(command, *, cwd=ROOT, env=None, timeout=240):
    """Runs a command to its end and returns a `CompletedProcess` with its texts."""
    return _finish([Popen(command, cwd=cwd, env=env)], timeout)[0]


def run_ranks(command, count, *, cwd=ROOT, env=None, timeout=240):
    """Runs a command in `count` processes that find each other as those of `torchrun` do.

    When one fails the others are killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(count):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**(os.environ if env is None else env), **{name: str(value) for name, value in own.items()}}
        processes.append(Popen(command, cwd=cwd, env=environment))
    return _finish(processes, timeout)


def _finish(processes, timeout):
    deadline = time.monotonic() + timeout
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(processes[0].args, timeout)
            time.sleep(0.005)
    finally:
        for process in processes:
            process.kill()
        said = [process.communicate() for process in processes]
    ended = zip(processes, said, strict=True)
    return [subprocess.CompletedProcess(it.args, it.returncode, *texts) for it, texts in ended]
