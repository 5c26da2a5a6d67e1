"""Many at once: adapters that come and go under load, and a long mixture of requests over one prefix cache."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from .serve import answers
from .server import BASE, Server, serving
from .subject import KINDS, expected_tokens, make_model, prompts, save_adapter, save_adapters, save_lora

ADAPTERS, CONCURRENT, LENGTH = 100, 64, 8
MEGABYTE = 2**20


class Visit(NamedTuple):
    """An adapter that is loaded, asked and unloaded."""

    name: str
    path: Path
    texts: list[list[int]]
    expected: list[list[int]]
    is_broken: bool
    is_left: bool  # whether a client goes away in the middle of an answer


def visit(server: Server, case: Visit) -> list[str]:
    """What went wrong."""
    status, answer = server.load(case.name, case.path)
    if case.is_broken:
        return [] if status >= 400 and "is damaged" in answer else [f"{case.name}: {status} {answer}"]
    if status != 200:
        return [f"{case.name}: {status} {answer}"]
    if case.is_left:
        server.cancel(case.name, case.texts[0], 200)
    found = [server.complete(case.name, text, LENGTH) for text in case.texts]
    status, answer = server.unload(case.name)
    wrong = [] if status == 200 else [f"{case.name}: {status} {answer}"]
    return wrong + [f"{case.name}: {a} for {b}" for a, b in zip(found, case.expected, strict=True) if a != b]


def visits(folder: Path, model: Path) -> Iterator[Visit]:
    """One for each adapter; every tenth has a second one by the same name, from another folder, and every 25th is
    broken."""
    paths = {path.name: path for path in save_adapters(model, folder, ADAPTERS + ADAPTERS // 10)}
    texts = prompts(2 * len(paths), seed=1, shared=40)
    own = {name: texts[2 * i : 2 * i + 2] for i, name in enumerate(paths)}
    requests = [(name, text) for name, two in own.items() for text in two]
    expected = expected_tokens(model, paths, requests, LENGTH)
    for i, (name, path) in enumerate(paths.items()):
        if i % 25 == 24 and i < ADAPTERS:
            (path / "adapter_model.safetensors").write_bytes(b"broken")
        known_as = name if i < ADAPTERS else list(paths)[10 * (i - ADAPTERS)]
        yield Visit(known_as, path, own[name], expected[2 * i : 2 * i + 2], i % 25 == 24 and i < ADAPTERS, i % 7 == 0)


@pytest.mark.slow
def test_adapters_come_and_go(tmp_path: Path) -> None:
    """Two rounds: no wrong token, an error for each broken folder, and no memory that the second one takes more."""
    model = make_model(tmp_path / "model")
    cases = list(visits(tmp_path / "adapters", model))
    base = [(None, text) for text in prompts(30, seed=2)]
    expected = expected_tokens(model, {}, base, LENGTH)
    first, second = cases[:ADAPTERS], cases[ADAPTERS:]  # second: replaced under a new path
    with serving(model, {}, tmp_path, **{"max-cpu-loras": 32}) as server, ThreadPoolExecutor(CONCURRENT) as pool:
        memory = []
        for _ in range(3):
            wrong: list[str] = []
            for part in (first, second):
                plain = pool.submit(server.complete_all, base, LENGTH, 8)
                wrong += [line for lines in pool.map(lambda case: visit(server, case), part) for line in lines]
                assert plain.result() == expected
            assert not wrong, "\n".join(wrong[:10])
            memory.append(server.memory())
        assert server.metric("vllm:num_requests_running") == server.metric("vllm:kv_cache_usage_perc") == 0
        assert [found["id"] for found in json.loads(server.get("/v1/models")[1])["data"]] == [BASE]
    assert memory[2] - memory[1] < 64 * MEGABYTE, [x // MEGABYTE for x in memory]


@pytest.mark.slow
def test_ten_thousand_requests(tmp_path: Path) -> None:
    """Over one prefix cache, of which most texts find their beginning there; no token of another adapter."""
    model = make_model(tmp_path / "model")
    adapters = {
        name: save_adapter(model, tmp_path / name, seed, **kind) for seed, (name, kind) in enumerate(KINDS.items())
    }
    adapters["lora"] = save_lora(model, tmp_path / "lora", 7)
    texts = prompts(40, shared=64)
    known = [(name, text) for name in (None, *adapters) for text in texts]
    written = expected_tokens(model, adapters, known, 4)
    places = random.Random(0).choices(range(len(known)), k=10_000)
    options = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "max_loras": 5}
    found = answers(model, adapters, [known[i] for i in places], 4, tmp_path, **options)
    assert sum(answer.tokens != written[i] for answer, i in zip(found, places, strict=True)) == 0
    hits = sum(answer.num_cached for answer in found) / sum(len(known[i][1]) for i in places)
    print(f"hit rate of the prefix cache: {hits:.0%}")
    assert hits > 0.4
