"""Pictures and tables of what an adapter is and did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import matplotlib
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ..tuner.observation import adapted_layers


def plot_loss(record: dict[str, Any], path: Path | IO[str]) -> None:
    """Training and validation loss against the step, as PNG, or as SVG into a stream."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*record["train_loss"], strict=True), color="#9bbfe0", linewidth=1.2, label="training batch")
    validation = [[0, record["start_loss"]], *record["validation_loss"]]
    axes.plot(*zip(*validation, strict=True), color="#1f4e79", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per token", yscale="log")
    axes.yaxis.set_major_formatter("{x:.2g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    title = f"{record['settings']['data']}, {record['trainable_parameters']:,} trainable parameters"
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    save(figure, path)


def plot_shares(shares: Tensor, path: Path | IO[str]) -> None:
    """The share of attention that the prefix takes, layers by heads, as PNG, or as SVG into a stream."""
    layers, heads = shares.shape
    figure, axes = plt.subplots(figsize=(2 + 0.32 * heads, 1.6 + 0.2 * layers), layout="constrained")
    image = axes.imshow(100 * shares, cmap="viridis", aspect="auto", vmin=0)
    axes.set(xlabel="head", ylabel="layer", xticks=range(heads), yticks=range(0, layers, max(1, layers // 15)))
    axes.set_title("attention on the prefix", fontsize=11)
    figure.colorbar(image, ax=axes, label="% of the attention mass", shrink=0.8)
    save(figure, path)


def plot_token_shares(shares: Tensor, tokens: Sequence[str], stream: IO[str]) -> None:
    """The same by layer and token [layers, L], as SVG."""
    layers, length = shares.shape
    width = min(14, 2.4 + 0.18 * length)
    figure, axes = plt.subplots(figsize=(width, 2.2 + 0.12 * layers), layout="constrained")
    image = axes.imshow(100 * shares, cmap="viridis", aspect="auto", vmin=0)
    axes.set(ylabel="layer", yticks=range(0, layers, max(1, layers // 15)))
    shown = range(0, length, -(-length // 70))
    axes.set_xticks(shown, [tokens[i].replace("$", r"\$") for i in shown], rotation=90, fontsize=7)
    figure.colorbar(image, ax=axes, label="% of the attention mass", shrink=0.8)
    save(figure, stream)


def save(figure: Any, path: Path | IO[str]) -> None:
    figure.savefig(path, dpi=150, format="png" if isinstance(path, Path) else "svg")
    plt.close(figure)


def describe_adapter(model: nn.Module, folder: Path) -> list[tuple[str, str]]:
    """Facts about the adapter `default` of a model that was loaded from a folder: name and value."""
    layers = list(adapted_layers(model).values())
    adapters = [layer["default"] for layer in layers]
    trained = ("Z", "Z_A", "Z_B", "log_k")
    parameters = sum(p.numel() for a in adapters for n, p in a.named_parameters() if n.split(".")[-1] in trained)
    token = sum(g.num_kv_heads * (g.head_dim + g.value_dim) for g in (layer.geometry for layer in layers))
    heads = sorted({len(adapter.log_k) for adapter in adapters})
    r = sorted({a.feature_map.num_features(layer.geometry.head_dim) for a, layer in zip(adapters, layers, strict=True)})
    blocks = [adapter.parts for adapter in adapters if adapter.parts]
    parts = [part for own in blocks for part in own.values()]
    size = (folder / "adapter_model.safetensors").stat().st_size
    return [
        ("covers", str(model.ntk_summary("default"))),  # type: ignore[operator]
        ("attention modules", str(len(layers))),
        ("state heads per module", numbers(heads)),
        ("features r", f"{numbers(r)} ({adapters[0].feature_map})"),
        ("positions", adapters[0].positions),
        ("rank of Z", str(adapters[0].rank or "full")),
        ("feed-forward blocks", str(len(blocks))),
        ("rank of their Z", numbers(sorted({part.rank for part in parts})) or "-"),
        ("trainable parameters", f"{parameters:,}"),
        ("adapter file", f"{size / 2**20:.2f} MiB"),
        ("stands for a prefix of", "any length; a KV prefix of as many numbers has "
         f"{parameters / token:.0f} tokens"),
    ]  # fmt: skip


def numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
