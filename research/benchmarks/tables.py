"""One table per benchmark, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from research.recording import table

from .grouping import by_sizes, fastest, fastest_prefix, median, number, prefix_lengths
from .rows import Row

MIB = 2**20


def milliseconds(row: Row | None, reference: float | None = None) -> str:
    """Time, and in brackets how many times the reference it is."""
    if row is None:
        return ""
    if "error" in row:
        return row["error"].split(":")[0]
    ratio = f" ({row['milliseconds']['median'] / reference:.2f})" if reference else ""
    return f"{number(row['milliseconds']['median'])}{ratio}"


def mebibytes(row: Row | None, *names: str) -> str:
    if row is None or row.get("peak_memory_bytes") is None:
        return ""
    return number(sum(row[name] for name in names) / MIB)


def floor(row: Row | None, rows: Sequence[Row]) -> float | None:
    """Milliseconds that the attention of a row needs at least, by the measured ceilings of its GPU."""
    ceilings = {row["method"]: row for row in rows if row["method"].startswith("ceiling") and median(row)}
    if row is None or len(ceilings) < 2:
        return None
    copy, matmul = ceilings["ceiling copy"], ceilings["ceiling matmul"]
    bounds = row["figures"]["bounds"][row["method"].split()[0]]
    bytes_per_ms = copy["figures"]["bytes"] / copy["milliseconds"]["median"]
    flops_per_ms = matmul["figures"]["flops"] / matmul["milliseconds"]["median"]
    passes = zip(bounds["bytes"], bounds["flops"], strict=True)
    return sum(max(moved / bytes_per_ms, flops / flops_per_ms) for moved, flops in passes)


def times_floor(row: Row | None, rows: Sequence[Row]) -> str:
    time, least = median(row), floor(row, rows)
    return f"{time / least:.2f}" if time and least else ""


def attention(rows: list[Row]) -> list[str]:
    groups = by_sizes(row for row in rows if not row["method"].startswith("ceiling"))
    kinds = list(dict.fromkeys((g.sizes["d"], g.sizes["H_kv"], g.sizes["mode"]) for g in groups))
    out = [ceilings(rows)]
    for d, H_kv, mode in kinds:
        own = [g for g in groups if (g.sizes["d"], g.sizes["H_kv"], g.sizes["mode"]) == (d, H_kv, mode)]
        H, dtype = own[0].sizes["H"], own[0].sizes["dtype"]
        lengths = prefix_lengths(own[0].rows)
        first = ["B, L", "plain", "its kernel"]
        floors = ["ours, times the floor", "plain, times the floor"]
        free = "ours auto" in own[0].rows
        others = ["ours rotary"] if free else []
        others += ["ours sdpa", "ours triton", "ours random", "softmax + phi M", "naive fp32"]
        others = [name for name in others if any(name in g.rows for g in own)]
        head = [*first, "ours" if free else "ours rotary", *floors, *(f"prefix m={m:,}" for m in lengths), *others]
        body, memory = [], []
        for sizes, methods in own:
            plain, ours = fastest(methods, "plain"), methods.get("ours auto" if free else "ours rotary")
            shown = [fastest_prefix(methods, m) for m in lengths] + [methods.get(name) for name in others]
            shape, reference = f"{sizes['B']}, {sizes['L']:,}", median(plain)
            kernel = plain["method"].split()[-1] if plain else ""
            body.append(
                [shape, milliseconds(plain), kernel, milliseconds(ours, reference)]
                + [times_floor(ours, rows), times_floor(plain, rows)]
                + [milliseconds(row, reference) for row in shown]
            )
            memory.append([shape, *(mebibytes(row, "peak_memory_bytes") for row in (plain, ours, *shown))])
        title = f"{mode}, {dtype}, causal, H = {H}, H_kv = {H_kv}, d = {d}"
        out += [f"**{title}**: milliseconds, in brackets over plain.\n", table(head, body)]
        if any(line[1] for line in memory) and len(lengths) > 1:
            names = ["B, L", "plain", "ours", *(name for name in head if name.startswith("prefix")), *others]
            out += [f"**{title}**: MiB that one call allocates at its peak.\n", table(names, memory)]
    return out


def ceilings(rows: list[Row]) -> str:
    found = {row["method"]: row for row in rows if row["method"].startswith("ceiling") and median(row)}
    per_ms = {
        name: {k: v / row["milliseconds"]["median"] for k, v in row["figures"].items()} for name, row in found.items()
    }
    if len(per_ms) < 2:
        return ""
    copy, matmul = per_ms["ceiling copy"]["bytes"], per_ms["ceiling matmul"]["flops"]
    return (
        f"Ceilings measured in the same run: {copy / 1e9:.2f} TB/s for a copy (read and written), "
        f"{matmul / 1e9:.3g} TFLOP/s for a product of matrices.\n"
    )


def figure3(rows: list[Row]) -> list[str]:
    out = []
    groups = by_sizes(rows)
    lengths = [m for i, m in enumerate(prefix_lengths(groups[0].rows)) if i % 4 == 0]
    body = []
    for sizes, methods in groups:
        ours = methods["ours"]
        for name in ("prefix", "prefix-kv"):
            shown = [methods.get(f"{name} m={m}") for m in lengths]
            crossing = first_slower(methods, name, median(ours))
            body.append([f"{sizes['L']}", name, milliseconds(ours), *map(milliseconds, shown), crossing])
    head = ["L", "against", "ours, any m", *(f"m={m:,}" for m in lengths), "slower than ours from m ="]
    out += ["Milliseconds of one layer, forward.\n", table(head, body)]
    return out


def first_slower(methods: dict[str, Row], name: str, reference: float | None) -> str:
    """The m from which on prefix attention is slower than ours."""
    from_m = ""
    for m in reversed(prefix_lengths(methods)):
        time = median(methods.get(f"{name} m={m}"))
        if reference is None or time is None or time <= reference:
            return from_m
        from_m = f"{m:,}"
    return from_m


def decode(rows: list[Row]) -> list[str]:
    out = []
    for sizes, methods in by_sizes(rows, without=["launch"]):
        body = []
        for name in dict.fromkeys(name.rsplit(" ", 1)[0] for name in methods):
            line = ways(methods, name, ("graph", "eager"), "no prefix", sizes["B"])
            row = next(row for key, row in methods.items() if key.startswith(name))
            cache = row["figures"].get("cache_bytes")
            body.append([*line, number(cache / MIB) if cache else ""])
        head = ["method", "graph, ms", "graph, tokens/s", "eager, ms", "eager, tokens/s", "cache, MiB"]
        title = f"Batch {sizes['B']}, {sizes['prompt']} cached tokens in a cache of {sizes['capacity']:,}"
        out += [f"**{title}**: per step, in brackets over no prefix.\n", table(head, body)]
    return out


def ways(methods: dict[str, Row], name: str, kinds: Sequence[str], reference: str, tokens: int) -> list[str]:
    """A method, and for each way to run it the time (over the reference) and tokens per second."""
    line = [name]
    for kind in kinds:
        row = methods.get(f"{name} {kind}")
        time = median(row)
        line += [milliseconds(row, median(methods.get(f"{reference} {kind}")))]
        line += [number(1e3 * tokens / time) if time else ""]
    return line


def training(rows: list[Row]) -> list[str]:
    out = []
    for sizes, methods in by_sizes(rows, without=["run"]):
        reference = median(methods.get("frozen 1"))
        body = [
            [
                name.rsplit(" ", 1)[0],
                name.rsplit(" ", 1)[1],
                milliseconds(row, reference),
                mebibytes(row, "held_memory_bytes", "peak_memory_bytes"),
                f"{row['figures']['trainable_parameters']:,}" if row["figures"] else "",
            ]
            for name, row in methods.items()
        ]
        head = ["method", "run", "ms per step (over frozen)", "peak memory, MiB", "trainable parameters"]
        out += [f"**Batch {sizes['B']}, {sizes['L']:,} tokens each.**\n", table(head, body)]
    return out


def large(rows: list[Row]) -> list[str]:
    out = []
    for sizes, methods in by_sizes(rows):
        reference = median(methods.get("bf16"))
        body = [
            [
                name,
                milliseconds(row, reference),
                mebibytes(row, "held_memory_bytes"),
                mebibytes(row, "held_memory_bytes", "peak_memory_bytes"),
            ]
            for name, row in methods.items()
        ]
        head = ["frozen model", "ms per step (over bf16)", "held between steps, MiB", "peak memory, MiB"]
        out += [f"**Batch {sizes['B']}, {sizes['L']:,} tokens each.**\n", table(head, body)]
    return out


def processes(rows: list[Row]) -> list[str]:
    out = []
    for sizes, methods in by_sizes(rows):
        alone = methods.get("one process")
        body = []
        for name, row in methods.items():
            time, figures = median(row), row["figures"]
            rate = number(1e3 * figures["tokens"] / time) if time else ""
            line = [name, milliseconds(row), rate, f"{speed(row) / speed(alone):.2f}" if time and median(alone) else ""]
            line += [mebibytes(row, "held_memory_bytes"), mebibytes(row, "held_memory_bytes", "peak_memory_bytes")]
            body.append([*line, difference(row, alone)])
        head = ["way", "ms per step", "tokens/s", "over one process", "held per GPU, MiB", "peak per GPU, MiB"]
        head.append("largest relative difference of a loss")
        title = f"{sizes['num_hidden_layers']} layers of size {sizes['hidden_size']:,}, {sizes['dtype']}"
        batch = f"batch {sizes['B']} of all processes together, {sizes['L']:,} tokens each"
        losses = alone["figures"]["losses"] if alone and alone["figures"] else []
        told = f" One process: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps." if losses else ""
        out += [f"**{title}, {batch}.**{told}\n", table(head, body)]
    return out


def speed(row: Row) -> float:
    """Tokens per millisecond."""
    return row["figures"]["tokens"] / row["milliseconds"]["median"]


def difference(row: Row, reference: Row | None) -> str:
    """Of the losses of the same batches, relative."""
    if reference is None or row is reference or "error" in row or "error" in reference:
        return ""
    if row["figures"]["tokens"] != reference["figures"]["tokens"]:
        return "other batches"
    pairs = zip(row["figures"]["losses"], reference["figures"]["losses"], strict=True)
    return f"{max(abs(x - y) / abs(y) for x, y in pairs):.1e}"


def building(rows: list[Row]) -> list[str]:
    body = []
    for sizes, methods in by_sizes(rows):
        ceiling = bytes_per_ms(methods.get("copy"))
        for name, row in methods.items():
            rate = bytes_per_ms(row)
            line = [f"{sizes['m']:,}", sizes["dtype"], name, milliseconds(row)]
            tokens = row["figures"].get("tokens")
            line += [number(tokens / row["milliseconds"]["median"] / 1e3) if rate and tokens else ""]
            line += [f"{rate / 1e6:.3g}" if rate else "", f"{rate / ceiling:.0%}" if rate and ceiling else ""]
            body.append([*line, mebibytes(row, "peak_memory_bytes")])
    head = [
        "m",
        "dtype",
        "method",
        "ms",
        "million tokens/s",
        "GB/s",
        "of the copy's",
        "peak memory above the part, MiB",
    ]
    return [table(head, body)]


def bytes_per_ms(row: Row | None) -> float | None:
    time = median(row)
    return row["figures"]["bytes"] / time if row and time else None


def cpu(rows: list[Row]) -> list[str]:
    body = []
    for sizes, methods in by_sizes(rows):
        plain = methods.get("plain")
        line = [sizes["dtype"], f"{sizes['L']:,}", sizes["mode"]]
        body.append([*line, milliseconds(plain), milliseconds(methods.get("ours"), median(plain))])
    return [table(["dtype", "L", "mode", "plain, ms", "ours, ms (over plain)"], body)]


def microseconds(row: Row | None) -> float | None:
    """Of one call."""
    time = median(row)
    return 1e3 * time / row["figures"]["calls"] if row and time else None


def host(rows: list[Row]) -> list[str]:
    body = []
    for sizes, methods in by_sizes(rows):
        reference = microseconds(next(iter(methods.values())))
        shape = [str(sizes["B"]), str(sizes["L"])]
        shape += ["", "", ""] if "H" not in sizes else [str(sizes[name]) for name in ("H", "H_kv", "d")]
        for name, row in methods.items():
            time = microseconds(row)
            line = [sizes["mode"], *shape, name, number(time) if time else milliseconds(row)]
            more = time is not None and reference is not None and not name.startswith("plain")
            body.append([*line, *([f"{time - reference:+.0f}", f"{time / reference:.2f}"] if more else ["", ""])])
    head = ["mode", "B", "L", "H", "H_kv", "d", "method", "µs per call", "above plain, µs", "over plain"]
    return [table(head, body)]


def adapters(rows: list[Row]) -> list[str]:
    out = []
    for sizes, methods in by_sizes(rows):
        reference = median(methods.get("no adapter"))
        body = []
        for name, row in methods.items():
            time = median(row)
            rate = number(1e3 * row["figures"]["tokens"] / time) if time else ""
            body.append([name, milliseconds(row, reference), rate, str(row["figures"].get("adapters_in_batch", ""))])
        head = ["method", "ms per call (over no adapter)", "tokens/s", "adapters in the batch"]
        title = (
            f"Batch {sizes['B']}, {sizes['adapters']} adapters on the model, {sizes['prompt']} + {sizes['new']} tokens"
        )
        out += [f"**{title}.**\n", table(head, body)]
    return out


def generate(rows: list[Row]) -> list[str]:
    out = []
    for sizes, methods in by_sizes(rows, without=["cache"]):
        names = dict.fromkeys(row["method"] for row in methods.values())
        tokens = sizes["B"] * sizes["new"]
        body = [ways(methods, name, ("dynamic", "static"), "no adapter", tokens) for name in names]
        head = ["method", "dynamic, ms (over no adapter)", "tokens/s", "static, ms (over no adapter)", "tokens/s"]
        out += [f"**Batch {sizes['B']}, {sizes['prompt']} + {sizes['new']} tokens.**\n", table(head, body)]
    return out


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "attention": attention,
    "figure3": figure3,
    "decode": decode,
    "generate": generate,
    "training": training,
    "large": large,
    "processes": processes,
    "adapters": adapters,
    "building": building,
    "cpu": cpu,
    "host": host,
}
