"""The rotary positions of the queries of a model of transformers, as a `Rotation` that undoes them, in every call.

The model's own function is asked, with the tables of the call: a query whose rotated pairs are all (1, 0) comes out as
(cos, sin), any scale among them. Which numbers of a head are pairs is found once for every function, on angles that
are made up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rotation import Rotation, unrotated
from .calls import CALLS
from .geometry import named
from .rotary_source import RotarySource, rotary_sources

ROTATION = "ntk_rotation"  # the keyword argument with which a call tells our attention function its positions
WAYS_OUT = 'expected NTKAttentionConfig(positions="rotary"), or to leave the module out with exclude_modules'
# Functions whose tables have a shape that says something else elsewhere.
UNKNOWN = {"vision_apply_rotary_emb": "its tables have the tokens in another place than others (Llama 4's pictures)"}
# Where heads and tokens stand in the tensor that a function rotates.
LAYOUTS = {"BHLd": "b h l d", "BLHd": "b l h d", "LHd": "l h d"}
B, H, L, P = 2, 5, 3, 6  # sizes of what is made up, all different
# Where the entries of P pairs stand in a table.
ENTRIES: dict[str, Callable[[int], slice]] = {
    "first": lambda P: slice(0, P),
    "every other": lambda P: slice(0, 2 * P, 2),
}
MAX_TABLES = 4  # that a model has in turn: some have others in every second layer
AXES = 2  # of positions of patches, where a function asks for them


@dataclass(frozen=True)
class Form:
    """What a function that rotates queries is given, and what it makes of it.

    Args:
        layouts: of the query, by the number of dimensions of the tables.
        before: the width of the runs that pairs lie in before the rotation, as in `Rotation`; None for one run.
        after: likewise after it.
        runs: the number of runs, where there are several wide ones.
        is_single: whether a table has one entry for each pair, not one for each number.
        entries: which entries of cos and sin are those of the pairs, in their order; None where that is not known, and
            the function is asked in every call.
        is_last: whether the function rotates the last numbers of a longer head.
        leaves_first: whether it leaves the first tokens alone, where there are more than the tables have.
        takes_last: whether it takes the last rows of tables that are longer than the query.
    """

    layouts: Mapping[int, str]
    before: int | None
    after: int | None
    runs: int
    is_single: bool
    entries: str | None = None  # of ENTRIES
    is_last: bool = False
    leaves_first: bool = False
    takes_last: bool = False

    def widths(self, num_pairs: int) -> tuple[int, int]:
        """Of the runs before and after."""
        whole = 2 * num_pairs // self.runs
        return self.before or whole, self.after or whole


@dataclass(frozen=True, eq=False)
class Rotary:
    """How the modules of a class rotate their queries; the same object for all of them, also in copies and pickles."""

    cls: type
    index: int
    source: RotarySource
    form: Form

    def __reduce__(self) -> Any:
        return rotary_at, (self.cls, self.index)

    def of_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], head_dim: int
    ) -> Positions | None:
        """The positions of the queries in a call of the module; None where it rotates nothing in this one."""
        tables = self.source.tables(module, *[p.of(args, kwargs) for p in self.source.parameters])
        if tables is None or tables[0] is None:
            return None
        if torch.compiler.is_compiling():  # the compiler computes once what is the same in all layers
            return Positions(self.rotation(module, tables, head_dim), self.form, self.source.cuts)
        # All layers get the same tables: what one has made of them serves the others.
        table, version = tables[0], -1 if tables[0].is_inference() else tables[0]._version
        for of_table, its_version, rotary, size, positions in CALLS.rotations:
            if of_table() is table and rotary is self and size == head_dim and its_version == version:
                return Positions(positions.rotation, self.form, True) if self.source.cuts else positions
        positions = Positions(self.rotation(module, tables, head_dim), self.form, self.source.cuts)
        keep(CALLS.rotations, table, version, self, head_dim, positions)
        return positions

    @torch.no_grad()
    def rotation(self, module: nn.Module | None, tables: tuple[Any, ...], head_dim: int) -> Rotation:
        """What undoes these tables in heads of this size.

        Raises:
            ValueError: if the tables have another shape than those that were tried.
        """
        table = tables[0]
        layout = self.form.layouts.get(table.dim())
        if layout is None:
            raise ValueError(
                f"{self.cls.__name__} rotates its queries with tables of shape {list(table.shape)}, from which their "
                f"positions cannot be told: {WAYS_OUT}"
            )
        R = table.shape[-1] * (2 if self.form.is_single else 1)
        before, after = self.form.widths(R // 2)
        own = table.real.dtype if table.is_complex() else table.dtype
        start = head_dim - R if self.source.is_last or self.form.is_last else 0
        if self.form.entries is not None:
            entries = ENTRIES[self.form.entries](R // 2)
            cos, sin = (x[..., entries].view(-1, *x.shape[-2:-1], R // 2) for x in tables[:2])
            return Rotation.of(cos, sin, width=after, start=start)
        dtype = torch.promote_types(own, torch.float32)
        pairs = (torch.arange(R, device=table.device) % before < before // 2).to(dtype)
        length, batch = table.shape[-2], table.shape[0] if table.dim() == 3 else 1
        shape = {"b": batch, "h": 1, "l": length}
        probe = pairs.expand(*(shape[x] for x in LAYOUTS[layout].split()[:-1]), R).contiguous()
        out = first(self.source.turn(module, probe, probe, *tables)).to(dtype).reshape(batch, length, R)
        cos, sin = out.unflatten(-1, (-1, 2, after // 2)).unbind(-2)
        cos, sin = cos.flatten(-2).to(own), sin.flatten(-2).to(own)  # which are numbers of this dtype
        return Rotation.of(cos, sin, width=after, start=start)


def keep(made: list[Any], table: Tensor, *what: Any) -> None:
    """Add what was made of a table to a short list, until the table is gone or others have come."""

    def forget(_: Any) -> None:
        made[:] = [entry for entry in made if entry[0]() is not None]

    made.append((weakref.ref(table, forget), *what))
    del made[:-MAX_TABLES]


class Positions:
    """Those of the queries of one call of a module.

    Args:
        rotation: of all of them.
        form: of the function that rotates them.
        come_apart: whether the module may call its attention function for one piece of the queries after another.
    """

    def __init__(self, rotation: Rotation, form: Form, come_apart: bool):
        self.rotation, self.form, self.come_apart, self.taken = rotation, form, come_apart, 0

    def of(self, query: Tensor, kind: str) -> Rotation:
        """Of a query [B, H, L, d] of a module of this kind, the next L.

        Raises:
            ValueError: if there are fewer.
        """
        rotation, length = self.rotation, query.shape[2]
        batch, rows, _ = rotation.table.shape
        if rows == length and batch == 1 and rotation.table.device == query.device:
            return rotation
        if rows != length:
            if self.form.leaves_first and rows < length:
                rotation = with_first(rotation, length - rows)
            elif self.form.takes_last and rows > length:
                rotation = rotation.rows(rows - length, length)
            elif self.come_apart:
                rotation = rotation.rows(self.taken, length)
                self.taken += length
        table = rotation.table
        if table.shape[1] != length or table.shape[0] not in (1, query.shape[0]):
            raise ValueError(
                f"{kind} has queries {list(query.shape)} with the positions of {list(self.rotation.table.shape[:2])} "
                f"tokens: {WAYS_OUT}"
            )
        return rotation if table.device == query.device else rotation._replace(table=table.to(query.device))


def with_first(rotation: Rotation, count: int) -> Rotation:
    """With so many tokens before, which are not rotated."""
    table = torch.nn.functional.pad(rotation.table, (0, 0, count, 0))
    table[:, :count, : rotation.num_pairs] = 1.0
    return rotation._replace(table=table)


def rotary_of(module: nn.Module, name: str) -> Rotary | None:
    """How a module rotates its queries; None where it does not.

    Raises:
        ValueError: if that cannot be undone.
    """
    cls: Any = type(module)
    indices = [i for i, source in enumerate(rotary_sources(cls)) if source.is_reached(module)]
    if not indices:
        return None
    sources = [rotary_sources(cls)[i] for i in indices]
    reason = next((source.refused for source in sources if source.refused is not None), None)
    found = None if reason else rotary_at(cls, indices[0])
    if reason is None and len(indices) > 1:
        reason = "it rotates them in several places"
    elif reason is None and found is None:
        reason = UNKNOWN.get(sources[0].name, "how it pairs their numbers could not be found")
    elif "head_dim" in sources[0].after:
        reason = "it rotates them before it cuts them into heads"
    for attribute in sources[0].after:
        held = getattr(module, attribute, None)
        parameters = list(held.parameters()) if isinstance(held, nn.Module) else [held]
        if any(isinstance(x, nn.Parameter) and x.numel() > 1 for x in parameters):
            reason = f"{attribute} weighs their numbers after they are rotated"
    if reason is not None:
        raise ValueError(
            f"{named(module, name)} puts rotary positions into its queries with {sources[0].name}, which cannot be "
            f"undone before phi: {reason}; {WAYS_OUT}"
        )
    return found


@cache
def rotary_at(cls: Any, index: int) -> Rotary | None:
    """The call of this index in a class, with what its function does; None where that is not found."""
    source = rotary_sources(cls)[index]
    form = None if source.name in UNKNOWN else form_of(source)
    return None if form is None else Rotary(cls, index, source, form)


def first(made: Any) -> Tensor:
    """The query, of what a function has made of a query and perhaps a key."""
    return made[0] if isinstance(made, tuple | list) else made


# --- what a function does, tried out ---


def form_of(source: RotarySource) -> Form | None:
    """What the function does, found on angles that are made up; None if it does not rotate pairs in a known way."""
    for before, after, runs, is_single in forms():
        form = Form({}, before, after, runs, is_single)
        layouts = {}
        for (dim, batch), layout in product(((3, B), (3, 1), (2, 1)), LAYOUTS):
            tried = replace(form, layouts={dim: layout})
            if dim not in layouts and undoes(source, tried, dim, batch=batch):
                layouts[dim] = layout
        if layouts:
            form, dim = replace(form, layouts=layouts), next(iter(layouts))
            entries = [name for name in ENTRIES if undoes(source, replace(form, entries=name), dim)]
            return replace(
                form,
                entries=entries[0] if len(entries) == 1 and runs == 1 else None,
                is_last=undoes(source, replace(form, is_last=True), dim, more_numbers=4),
                leaves_first=undoes(source, form, dim, more_tokens=2),
                takes_last=undoes(source, form, dim, more_tokens=-1),
            )
    return None


def forms() -> Iterator[tuple[int | None, int | None, int, bool]]:
    """Widths before and after, number of runs, and whether there is one entry for each pair: from usual to rare."""
    widths: list[tuple[int | None, int | None, int]] = [(None, None, 1), (2, 2, 1), (2, None, 1), (None, None, AXES)]
    for (before, after, runs), is_single in product(widths, (False, True)):
        yield before, after, runs, is_single


def undoes(
    source: RotarySource, form: Form, dim: int, *, batch: int = 1, more_numbers: int = 0, more_tokens: int = 0
) -> bool:
    """Whether a form is that of a function: undoing it gives back a query that is made up.

    Args:
        source: of the call.
        form: to try.
        dim: of the tables.
        batch: of the tables and the query.
        more_numbers: of a head, beside those that are rotated.
        more_tokens: of the query, before those that the tables are for; fewer where negative.
    """
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(batch, L, P, generator=generator, dtype=torch.float64) + 0.2
    x = torch.randn(len(angles), H, L + more_tokens, 2 * P + more_numbers, generator=generator, dtype=torch.float64)
    layout = form.layouts[dim]
    rotary = Rotary(type(None), 0, source, form)
    for tables in made_up(source, angles if dim == 3 else angles[0], form):
        try:
            query = {"BHLd": x, "BLHd": x.transpose(1, 2), "LHd": x[0].transpose(0, 1)}[layout]
            key = query if more_tokens >= 0 else torch.cat([query[:, :, :1], query], dim=2)
            y = first(source.turn(None, query, key, *tables)).double()
            y = y.reshape(query.shape)
            y = {"BHLd": y, "BLHd": y.transpose(1, 2), "LHd": y.transpose(0, 1)[None]}[layout]
            as_tried = replace(form, leaves_first=more_tokens > 0, takes_last=more_tokens < 0)
            positions = Positions(rotary.rotation(None, tables, x.shape[-1]), as_tried, False)
            back = unrotated(y, positions.of(y, ""))
        except Exception:  # a function of a model, given what it may not be made for
            continue
        start = more_numbers if form.is_last else 0
        inside = permuted(x[..., start : start + 2 * P], *form.widths(P))
        expected = torch.cat([x[..., :start], inside, x[..., start + 2 * P :]], dim=-1)
        if torch.allclose(back, expected, atol=1e-4) and not torch.allclose(y, expected, atol=1e-2):
            return True
    return False


def made_up(source: RotarySource, angles: Tensor, form: Form) -> Iterator[tuple[Any, ...]]:
    """Tables of these angles [..., P], in the ways in which models hold them."""
    cos, sin = angles.cos(), angles.sin()

    def repeated(x: Tensor) -> Iterator[Tensor]:
        if form.is_single:
            yield x
        elif form.runs > 1:
            yield torch.cat([part for run in x.chunk(form.runs, dim=-1) for part in (run, run)], dim=-1)
        else:
            yield torch.cat([x, x], dim=-1)
            yield x.repeat_interleave(2, dim=-1)

    names = source.table_names
    if len(names) == 1 and form.is_single:
        yield (torch.complex(cos, sin),)
    if len(names) in (2, 3) and "cos" in names[0] and "sin" in names[1] and names[2:] in ((), ("position_ids",)):
        others = (torch.zeros(*angles.shape[:-1], AXES, dtype=torch.long),) * len(names[2:])
        for pair in zip(repeated(cos), repeated(sin), strict=True):
            yield (*pair, *others)


def permuted(x: Tensor, before: int, after: int) -> Tensor:
    """Numbers whose pairs lie in runs of the one width, with their pairs in runs of the other."""
    pairs = x.unflatten(-1, (-1, 2, before // 2)).transpose(-1, -2).flatten(-3, -2)  # [..., P, 2]
    return pairs.unflatten(-2, (-1, after // 2)).transpose(-1, -2).flatten(-3)
