"""An engine of vLLM in a process of its own: `answers` gives it requests and waits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Small chunks, so that long texts come in several, beside tokens of others; blocks that short texts fill.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "enable_lora": True,
    "max_loras": 4,
    "max_cpu_loras": 32,
    "max_lora_rank": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 16,
    "max_model_len": 512,
    "block_size": 32,
    "enable_prefix_caching": True,
}


class Answer(NamedTuple):
    """What an engine wrote, and how many tokens of the text it found in its prefix cache."""

    tokens: list[int]
    num_cached: int


def answers(
    model: Path | str,
    adapters: Mapping[str, Path],
    requests: Sequence[tuple[str | None, list[int]]],
    length: int,
    folder: Path,
    **options: Any,
) -> list[Answer]:
    """For each (adapter or None, text), all given to one engine at once; greedy.

    Args:
        folder: for the files with which both processes speak.
        options: of the engine.
    """
    question, reply = folder / "question.json", folder / "reply.json"
    paths = {name: str(path) for name, path in adapters.items()}
    question.write_text(json.dumps([str(model), paths, list(requests), length, OPTIONS | options]))
    subprocess.run([sys.executable, "-m", "tests.vllm.serve", str(question), str(reply)], check=True)
    return [Answer(*answer) for answer in json.loads(reply.read_text())]


def serve(question: Path, reply: Path) -> None:
    """The other process."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, paths, requests, length, options = json.loads(question.read_text())
    engine = LLM(model=model, **options)
    loras = {name: LoRARequest(name, place, path) for place, (name, path) in enumerate(paths.items(), start=1)}
    outputs = engine.generate(
        [{"prompt_token_ids": text} for _, text in requests],
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False),
        lora_request=[loras.get(name) for name, _ in requests],
        use_tqdm=False,
    )
    reply.write_text(json.dumps([[list(o.outputs[0].token_ids), o.num_cached_tokens or 0] for o in outputs]))


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:]))
