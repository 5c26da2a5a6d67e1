"""The adapters of one attention module, by name, and what they do in a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from ..ops.state import PrefixState, RowStates
from .adapter import PrefixAdapter
from .arguments import OwnAttention
from .calls import CALLS
from .config import NTKAttentionConfig
from .coordinates import Coordinated
from .decoding import step_of
from .distributed import is_partitioned
from .feed_forward import FeedForward, Part
from .geometry import Geometry
from .merging import WEIGHT_DTYPES, Merged, check_mergeable, merge
from .rotation import ROTATION, Rotary


class NTKAttentionLayer(nn.ModuleDict, BaseTunerLayer):
    """The adapters of one attention module and its feed-forward block, by name; hangs on the attention as a child.

    Nothing here belongs to one call of the model, see `calls`: two threads may call it at once.

    Args:
        attention: the module.
        geometry: its sizes.
        own: the attention function that the layer takes the place of.
        mesh: of the processes that hold a part of the heads each; None where each holds all.
        encodes: whether the model is an encoder that writes nothing.
    """

    adapter_layer_names = ("adapters",)

    def __init__(
        self,
        attention: nn.Module,
        geometry: Geometry,
        own: OwnAttention,
        mesh: DeviceMesh | None = None,
        *,
        encodes: bool = False,
    ):
        super().__init__()
        self._attention = (attention,)  # in a tuple, since a child must not register its parent
        self.geometry = geometry
        self.own = own
        self.mesh = mesh
        self.encodes = encodes
        self._blocks: dict[str, tuple[FeedForward, list[RemovableHandle]]] = {}  # by the names of their parts
        self._merged: dict[str, Merged] = {}  # by the names of parts
        self.merged_adapters: list[str] = []  # whose parts are in the weights of the block
        self._rotary: Rotary | None = None
        self._position_hook: RemovableHandle | None = None
        self.register_load_state_dict_post_hook(share_loaded)

    @property
    def rows(self) -> RowStates | None:
        """The prefixes of the rows of the mixed batch that this thread is in; None outside of one."""
        return None if CALLS.mixed is None else CALLS.mixed.rows.get(self)

    @property
    def adapters(self) -> nn.ModuleDict:
        """This very layer, under the name that PEFT asks for."""
        return self

    def __getitem__(self, name: str) -> PrefixAdapter:
        return cast(PrefixAdapter, super().__getitem__(name))

    def get_base_layer(self) -> nn.Module:
        """The attention module, which goes on being what it was: PEFT would put us in its place."""
        return self._attention[0]

    def add_adapter(
        self,
        name: str,
        config: NTKAttentionConfig,
        block: FeedForward | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        """A new adapter, which looks after a feed-forward block as well, and sees queries without what `rotary` does.

        It takes over what does not train from another one of its kind: one that trains, or else the active one. Where
        none trains only if that leaves it in plain coordinates, in which a file is loaded to the last bit.
        """
        adapter = PrefixAdapter(config, replace(self.geometry, feed_forward=() if block is None else block.sizes))
        device = self.device()
        if device is not None and not adapter.log_k.is_meta:
            adapter.to(device)
        if self.mesh is not None:
            adapter.shard(self.mesh)
        others = [*self.active_names(), *self.keys()]
        alike = sorted((x for x in others if self[x].kind == adapter.kind), key=lambda x: not self[x].trains)
        self[name] = adapter
        if alike:
            twin = self.in_memory(alike[:1])[0]
            if adapter.trains or twin.trains or twin.is_plain():
                adapter.become_twin(twin)
            if not adapter.log_k.is_meta:  # else after it was loaded
                self.lead(name)
        if block is not None:
            self.look_after(block)
        if rotary is not None and self._position_hook is None:
            self._rotary = rotary
            hook = self.before_attention
            self._position_hook = self.get_base_layer().register_forward_pre_hook(hook, with_kwargs=True)
        BaseTunerLayer.set_adapter(self, self.active_adapters, inference_mode=config.inference_mode)

    @property
    def parts(self) -> dict[str, Part]:
        """Of the feed-forward block that adapters of this layer look after as well, by name."""
        return {part.size.name: part for block, _ in self._blocks.values() for part in block.parts}

    @property
    def block(self) -> FeedForward | None:
        """The feed-forward block that adapters of this layer look after as well; None until one does."""
        return next((block for block, _ in self._blocks.values()), None)

    def look_after(self, block: FeedForward) -> None:
        """Add to the outputs of the parts of this block from here on."""
        key = ",".join(size.name for size in block.sizes)
        if key not in self._blocks:
            self._blocks[key] = block, [hook for part in block.parts for hook in self.hooks_of(part, block.layer)]

    def hooks_of(self, part: Part, layer: nn.Module) -> list[RemovableHandle]:
        """Where one module is the part, no state is kept between the hooks, which torch.compile could not put into one
        graph with activation checkpointing."""
        name = part.size.name
        if part.first is part.last:
            return [part.last.register_forward_hook(partial(self.after_part, name), with_kwargs=True)]
        return [
            part.first.register_forward_pre_hook(self.before_first, with_kwargs=True),
            part.last.register_forward_hook(partial(self.after_last, name)),
            layer.register_forward_hook(self.after_layer, always_call=True),
        ]

    def before_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the input of a block that begins and ends in two modules."""
        CALLS.inputs[self] = input_of(args, kwargs)

    def after_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget the input, also where the layer failed before the end of the block."""
        CALLS.inputs.pop(self, None)

    def after_last(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output of such a block, with what its prefixes add."""
        return self.add_to_part(name, CALLS.inputs.pop(self), output)

    def after_part(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The output of a part that is one module, with what prefixes add."""
        return self.add_to_part(name, input_of(args, kwargs), output)

    def add_to_part(self, name: str, x: Tensor, output: Any) -> Any:
        """The output of a part, with what prefixes add; experts may return more than a tensor."""
        out = output[0] if isinstance(output, tuple) else output
        for prefix in self.prefixes_of(name):
            out = prefix(x if x.device == out.device else x.to(out.device), out)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    def prefixes_of(self, name: str) -> list[Callable[[Tensor, Tensor], Tensor]]:
        """What adds to the output of a part of the block in this call, given its input [..., in] and output
        [..., out]."""
        if self.merged_adapters and name in self._merged:
            self.check_merged(name)
            return []
        if CALLS.mixed is not None:
            rows = None if self.rests() else CALLS.mixed.feed_forward_rows.get(self, {}).get(name)
            return [] if rows is None else [rows]
        adapters = cast(list[PrefixAdapter], self.active())
        found: list[Callable[[Tensor, Tensor], Tensor]] = []
        for adapter in adapters:  # torch.compile cannot read a name in a comprehension here
            part = adapter.part_of_block(name)
            if part is not None:
                found.append(part)
        return found

    def check_mergeable(self, names: Sequence[str]) -> bool:
        """Whether these adapters have parts here; ValueError if some are merged, or one cannot go into its weight."""
        if self.merged_adapters:
            raise ValueError(f"the parts of {self.merged_adapters} are merged already: call unmerge_adapter() first")
        parts = [part for name, part in self.parts.items() if any(name in self[x].parts for x in names if x in self)]
        if parts and self.mesh is not None:
            raise ValueError("parts of feed-forward blocks cannot be merged in a tensor-parallel model")
        check_mergeable(parts)
        return bool(parts)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the parts of these adapters, by default the active ones, into the weights of their linear layers.

        Raises:
            ValueError: if some are there already, or a weight cannot take them.
        """
        names = list(adapter_names or self.active_names())
        if not self.check_mergeable(names):
            return
        adapters = self.in_memory(names)
        self.merged_adapters = names
        try:
            for name, part in self.parts.items():
                if prefixes := [adapter.parts[name] for adapter in adapters if name in adapter.parts]:
                    self._merged[name] = merge(part, prefixes, safe_merge)
        except ValueError:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Give the linear layers of the block the weights that they had, to the last bit."""
        for merged in self._merged.values():
            merged.undo()
        self._merged.clear()
        self.merged_adapters = []

    def check_merged(self, name: str) -> None:
        """Raise ValueError if a call asks for something else than the parts that are in the weights."""
        merged, active = set(self.merged_adapters), {x for x in self.active_names() if name in self[x].parts}
        problem = None
        if CALLS.mixed is not None or self.rests():
            problem = "rows of other adapters, or the model without them, were asked for"
        elif active != {x for x in merged if x in self and name in self[x].parts}:
            problem = f"the active adapters are {sorted(active)}"
        elif self._merged[name].is_stale:
            problem = "they were changed since"
        elif self.training and torch.is_grad_enabled() and any(self[x].trains for x in active):
            problem = "they do not train there"
        if problem is not None:
            raise ValueError(
                f"parts of the adapters {sorted(merged)} are merged into feed-forward blocks, and {problem}: call "
                "unmerge_adapter() first"
            )

    def before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand the positions of the queries to our attention function, where phi is to see these without.

        As a keyword argument: torch.compile could not put what is kept elsewhere into one graph with activation
        checkpointing.
        """
        step = step_of(self)
        is_free = step is not None and step.is_free
        if not (is_free or self in CALLS.watchers or self.sees_no_positions(self.active())):
            return None
        assert self._rotary is not None
        positions = self._rotary.of_call(module, args, kwargs, self.geometry.head_dim)
        return None if positions is None else (args, {**kwargs, ROTATION: positions})

    def sees_no_positions(self, active: Sequence[PrefixAdapter | RowStates]) -> bool:
        """Whether phi of what `active` gave sees queries without their rotary positions.

        Raises:
            ValueError: if it is so for some of them only.
        """
        if CALLS.mixed is not None:
            return bool(active) and self in CALLS.mixed.free
        if len(active) == 1:
            return isinstance(active[0], PrefixAdapter) and active[0].positions == "free"
        kinds = {part.positions for part in active if isinstance(part, PrefixAdapter)}
        if len(kinds) > 1:
            check_same_positions({name: self[name].positions for name in self.active_names()})
        return "free" in kinds

    def remove_hooks(self) -> None:
        """Leave the attention module and the feed-forward block alone from here on."""
        if self._position_hook is not None:
            self._position_hook.remove()
            self._position_hook = None
        self.leave_block()

    def leave_block(self) -> None:
        """Leave the feed-forward block alone from here on."""
        for _, hooks in self._blocks.values():
            for hook in hooks:
                hook.remove()
        self._blocks.clear()

    def rests(self) -> bool:
        """Whether the adapters do nothing: PEFT disabled them, or this call does without."""
        return bool(self._disable_adapters) or self in CALLS.resting

    def active(self) -> Sequence[PrefixAdapter | RowStates]:
        """What acts in this call: the active adapters, or the rows of the mixed batch; none where adapters rest."""
        if self.rests():
            return []
        if CALLS.mixed is None:
            active, modules = cast("str | list[str]", self._active_adapter), self._modules
            names = [active] if isinstance(active, str) else active  # asked for in every layer of every step
            found = [cast(PrefixAdapter, modules[name]) for name in names if name in modules]
            if any(["_hf_hook" in adapter.__dict__ for adapter in found]):
                return self.in_memory(names)
            return found
        rows = CALLS.mixed.rows.get(self)
        return [] if rows is None else [rows]

    def active_names(self) -> list[str]:
        """Active adapters that this layer has."""
        modules = self._modules
        return [name for name in cast(list[str], self.active_adapters) if name in modules]

    def states(self, active: Sequence[PrefixAdapter | RowStates], batch_size: int) -> list[PrefixState | RowStates]:
        """The prefixes of what `active` gave, one after another; in a mixed batch one per row."""
        states: list[PrefixState | RowStates] = []
        for part in active:
            if isinstance(part, PrefixAdapter):
                states.append(part.state())
            elif CALLS.mixed is not None:
                states.append(CALLS.mixed.of_batch(part, batch_size, type(self.get_base_layer()).__name__))
        return states

    def load_state(self, name: str, state: PrefixState) -> None:
        """Let an adapter become a given state, see `PrefixAdapter.load_state`."""
        self[name].load_state(state)
        self.lead(name)

    def lead(self, name: str) -> None:
        """After b, coordinates or tensors of an adapter were set: let adapters of its kind have the same b and
        coordinates, each with the function that it has.

        Equal parameters are equal functions then. One that trains gives its own to the others; one that does not takes
        those of one that trains. Where none trains nothing changes.
        """
        own = self[name]
        others = [self[key] for key in self.keys() if key != name and self[key].kind == own.kind]
        if own.trains:
            for other in others:
                other.follow(own)
        elif leaders := [other for other in others if other.trains]:
            own.follow(leaders[0])

    def stack(self, names: Sequence[str]) -> list[PrefixState]:
        """The states of these adapters, without weight for those that this layer lacks; none if it lacks all."""
        here = [name for name in names if name in self]
        own = {name: adapter.state() for name, adapter in zip(here, self.in_memory(here), strict=True)}
        if not own:
            return []
        first = next(iter(own.values()))
        Z, k, b = (torch.zeros_like(x) for x in (first.Z, first.k, first.log_scale))
        nothing = PrefixState.trusted(Z, k, b, first.feature_map)
        return [own.get(name, nothing) for name in names]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self or any(p.is_meta for p in self[adapter_name].parameters()):
            return
        device = device or self.device()
        if device is not None:
            self[adapter_name].to(device)

    def cast(self, name: str) -> None:
        """Give an adapter the dtype of the base layer."""
        own = set(self.parameters())
        dtypes = (p.dtype for p in self.get_base_layer().parameters() if p not in own)
        dtype = next((dtype for dtype in dtypes if dtype in WEIGHT_DTYPES), None)
        if name in self and dtype is not None:
            self[name].to(dtype)

    def device(self) -> torch.device | None:
        """Where the base layer runs: with offloading its weights are elsewhere between calls."""
        for module in self.get_base_layer().modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
        return next((p.device for p in self.get_base_layer().parameters() if not p.is_meta), None)

    def in_memory(self, names: Sequence[str]) -> list[PrefixAdapter]:
        """These adapters, taken back from accelerate's offloading: it brings weights only for a module's own forward.

        Raises:
            ValueError: if their values are gone: PEFT, when it loads an adapter, keeps on a disk those of LoRA only.
        """
        # Not self[name]: another thread may have deleted one since its name was read.
        modules = self._modules
        found = {name: cast(PrefixAdapter, modules[name]) for name in names if name in modules}
        for name, adapter in found.items():
            if "_hf_hook" in adapter.__dict__:
                try:
                    remove_hook_from_module(adapter, recurse=True)
                except ValueError as error:
                    raise ValueError(
                        f"the adapter {name!r} was offloaded to a disk without its values: expected get_peft_model and "
                        "set_peft_model_state_dict on a base model that is partly on a disk, not from_pretrained"
                    ) from error
                self._move_adapter_to_device_of_base_layer(name)
        return list(found.values())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Also of adapters that rest, and are offloaded."""
        self.in_memory(list(self.keys()))
        return super().state_dict(*args, **kwargs)


def share_loaded(layer: nn.Module, *_: Any) -> None:
    """After a state dict was loaded into a layer, see `NTKAttentionLayer.lead`."""
    assert isinstance(layer, NTKAttentionLayer)
    for name in list(layer.keys()):
        parts = [part for part in layer[name].modules() if isinstance(part, Coordinated) and part.is_loaded]
        for part in parts:
            part.is_loaded = False
        log_k = layer[name].log_k
        is_cut = is_partitioned(log_k) or (isinstance(log_k, DTensor) and layer.mesh is None)  # ZeRO-3 and FSDP
        if parts and not is_cut:
            layer.lead(name)


def check_same_positions(positions: Mapping[str, str]) -> None:
    """Raise ValueError unless adapters that act together see positions alike; by name, as their configs say."""
    if len(set(positions.values())) > 1:
        own = " and ".join(f"{name!r} has {value!r}" for name, value in positions.items())
        raise ValueError(f"adapters that act together must have the same positions: {own}")


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [..., D] that a block was called with."""
    return args[0] if args else next(iter(kwargs.values()))
