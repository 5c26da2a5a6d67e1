"""vLLM's HTTP server on the loopback interface, and the few requests that tests make of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
START_SECONDS, REQUEST_SECONDS = 300, 300
BASE = "base"  # the model's name in requests
# A flag of the server by itself has no value here.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce-eager": None,
    "enable-lora": None,
    "max-loras": 8,
    "max-lora-rank": 32,
    "max-model-len": 512,
    "max-num-batched-tokens": 128,
    "max-num-seqs": 64,
    "block-size": 32,
    "enable-prefix-caching": None,
    "disable-uvicorn-access-log": None,
}


class Server:
    """A running one."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path):
        self.port, self.process, self.log = port, process, log

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Status and text of the answer."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_SECONDS)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def complete(self, name: str | None, text: Sequence[int], length: int) -> list[int]:
        """The tokens that follow a text, greedily, by the adapter of this name or the base model."""
        body = self.request(name, text, length)
        status, answer = self.post("/v1/completions", body)
        if status != 200:
            raise RuntimeError(f"{status}: {answer[:500]}")
        return json.loads(answer)["choices"][0]["token_ids"]

    def complete_all(
        self, requests: Sequence[tuple[str | None, list[int]]], length: int, concurrent: int
    ) -> list[list[int]]:
        """Likewise for many, so many at a time."""
        with ThreadPoolExecutor(concurrent) as pool:
            return list(pool.map(lambda request: self.complete(*request, length), requests))

    def cancel(self, name: str | None, text: Sequence[int], length: int) -> None:
        """Ask for a long answer, read its beginning and go away."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=REQUEST_SECONDS)
        body = self.request(name, text, length) | {"stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.readline()
        connection.close()

    @staticmethod
    def request(name: str | None, text: Sequence[int], length: int) -> dict[str, Any]:
        return {
            "model": name or BASE,
            "prompt": list(text),
            "max_tokens": length,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def load(self, name: str, path: Path, **more: Any) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def metric(self, name: str) -> float:
        """The sum of a counter of the server."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def memory(self) -> int:
        """Bytes of the server's processes that are in memory."""
        pages = 0
        for process in (self.process.pid, *children(self.process.pid)):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def children(process: int) -> list[int]:
    """All processes that a process has started, and those that these have."""
    own = [int(x) for task in Path(f"/proc/{process}/task").iterdir() for x in (task / "children").read_text().split()]
    return own + [x for child in own for x in children(child)]


@contextmanager
def serving(model: Path | str, adapters: Mapping[str, Path], folder: Path, **options: Any) -> Iterator[Server]:
    """A server of a model with these adapters, which is stopped afterwards."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    arguments = ["--model", str(model), "--served-model-name", BASE, "--host", HOST, "--port", str(port)]
    for name, value in (OPTIONS | options).items():
        arguments += [f"--{name}"] if value is None else [f"--{name}", str(value)]
    if adapters:
        arguments += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    log = folder / "server.log"
    environment = os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        server = Server(port, process, log)
        try:
            wait(server)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait(server: Server) -> None:
    """Until the server answers.

    Raises:
        RuntimeError: if it ends or takes too long, with the end of what it said.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        try:
            if server.get("/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{server.log.read_text()[-5000:]}")
