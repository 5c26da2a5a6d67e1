"""What must hold for an adapted model. Each check measures the base model first, and asks of ours only what it does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ntk_attention import calibrate

from .inputs import Inputs, last_token_changed, padded, parameters_of
from .outputs import Outputs, are_equal, are_finite, difference, of_tokens
from .settings import Settings
from .shrink import FIRST_SPECIAL
from .subject import CHILD, PASSED, WRONG, NotApplicableError, Outcome, Subject

PADDING, NEW_TOKENS, SHIFT = 3, 4, 5
ROUNDING = 10.0  # times the base model's own
CACHES = ("dynamic", "static")


def passed_if(condition: bool, detail: str) -> Outcome:
    return Outcome(PASSED if condition else WRONG, detail)


def as_base(subject: Subject, of_base: float, apart: float) -> bool:
    """Whether ours deviates no more than rounding, or about as the base model does."""
    return apart <= max(subject.tolerance, ROUNDING * of_base)


def disabled(subject: Subject) -> Outcome:
    """With the adapter disabled, outputs are those of the base model bit by bit."""
    with subject.visible.disable_adapter():
        outputs = subject.run(subject.visible)
    return passed_if(are_equal(subject.outputs, outputs), f"{difference(subject.outputs, outputs):.1e}")


def weightless(subject: Subject) -> Outcome:
    """A prefix without weight changes nothing but rounding."""
    model = subject.adapted(init_weights="published", feed_forward_rank=None)
    with torch.no_grad():  # random models have logits far below the weight of that start
        for name, parameter in model.named_parameters():
            if f".{CHILD}." in name and name.endswith(".log_k"):
                parameter.fill_(-1e4)
    apart = difference(subject.outputs, subject.run(model))
    return passed_if(apart <= subject.tolerance, f"{apart:.1e}")


def causal(subject: Subject) -> Outcome:
    """Another last token changes no earlier output."""
    inputs = subject.inputs
    if inputs.text is None:
        raise NotApplicableError("no text")
    other = last_token_changed(inputs)
    early, late = slice(0, inputs.length - 1), slice(inputs.length - 1, None)

    def change(model: nn.Module, place: slice) -> float:
        outputs = [of_tokens(subject.run(model, x), inputs.rows, inputs.length) for x in (inputs, other)]
        return difference(*({n: x[:, place] for n, x in out.items()} for out in outputs)) if outputs[0] else 0.0

    of_base = subject.of_base(lambda: change(subject.base, early))
    if of_base > subject.tolerance:
        raise NotApplicableError("the base model looks in both directions")
    if subject.of_base(lambda: change(subject.base, late)) <= subject.tolerance:
        raise NotApplicableError("no output follows the last token")
    apart = change(subject.visible, early)
    return passed_if(as_base(subject, of_base, apart), f"{apart:.1e}")


def positions_of(inputs: Inputs, shift: int = 0) -> Inputs:
    """With explicit positions that count real tokens only."""
    assert inputs.text is not None
    ids = inputs.values[inputs.text]
    mask = inputs.values.get(inputs.text_mask, torch.ones_like(ids))
    name = "decoder_position_ids" if inputs.text == "decoder_input_ids" else "position_ids"
    return inputs.with_values(**{name: (mask.cumsum(1) - 1).clamp_min(0) + shift})


def takes_positions(subject: Subject) -> bool:
    name = "decoder_position_ids" if subject.inputs.text == "decoder_input_ids" else "position_ids"
    return subject.inputs.text is not None and name in parameters_of(subject.base)


def padding(subject: Subject, name: str, *, left: bool) -> Outcome:
    """Real tokens give what they give without padding."""
    inputs = subject.inputs
    mask_name = f"{name.removesuffix('input_ids')}attention_mask"
    if name not in inputs.values or mask_name not in parameters_of(subject.base):
        raise NotApplicableError("no text with a mask")
    wide = padded(inputs, name, mask_name, PADDING, left=left)
    real = slice(wide.length - inputs.length, None) if left else slice(0, inputs.length)

    def change(model: nn.Module, with_positions: bool) -> float:
        variants = [positions_of(x) if with_positions else x for x in (inputs, wide)]
        alone, beside = (of_tokens(subject.run(model, x), x.rows, x.length) for x in variants)
        if not alone:
            raise NotApplicableError("no output follows the tokens")
        return difference(alone, {n: x[:, real] for n, x in beside.items()})

    found = []
    for with_positions in (True, False):
        if with_positions and (name != inputs.text or not takes_positions(subject)):
            continue
        try:
            found.append(subject.of_base(partial(change, subject.base, with_positions)))
        except NotApplicableError:
            if not with_positions:
                raise
            continue
        if found[-1] <= subject.tolerance:
            apart = change(subject.visible, with_positions)
            if left and not with_positions and subject.tolerance < apart and is_shift(change, subject):
                raise NotApplicableError(f"{apart:.1e}, since padding shifts positions, which this model takes none of")
            return passed_if(as_base(subject, found[-1], apart), f"{apart:.1e}{', with positions' * with_positions}")
    raise NotApplicableError(f"padding changes the base model itself by {min(found):.1e}")


def is_shift(change: Callable[[nn.Module, bool], float], subject: Subject) -> bool:
    """Whether padding matters only to what phi makes of rotated queries: a prefix without weight hides it."""
    return change(subject.adapted(init_weights="published", feed_forward_rank=None), False) <= subject.tolerance


def padding_checks(subject: Subject) -> Iterator[tuple[str, Callable[[Subject], Outcome]]]:
    for name in ("input_ids", "decoder_input_ids"):
        if name in subject.inputs.values:
            what = "decoder padding" if name.startswith("decoder") else "padding"
            for left in (True, False):
                yield f"{what} {'left' if left else 'right'}", partial(padding, name=name, left=left)


@torch.no_grad()
def generated(subject: Subject, model: Any, **options: Any) -> Outputs:
    """Logits of each new token, and the tokens."""
    torch.manual_seed(0)
    values = {k: v.clone() if isinstance(v, Tensor) else v for k, v in subject.inputs.values.items()}
    settings = Settings(subject.base.config)
    size = settings.text("vocab_size", default=FIRST_SPECIAL)
    # Places of signals, which would have to come with them.
    special = sorted({*range(FIRST_SPECIAL, size), *settings.places(size)}) or None
    out = model.generate(
        **values,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        suppress_tokens=special,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    if not getattr(out, "logits", None):
        raise NotApplicableError("its generation gives no logits")
    return {f"logits.{i}": x for i, x in enumerate(out.logits)}


def cache(subject: Subject, kind: str) -> Outcome:
    """Greedy generation with a cache is that without."""
    if not subject.base.can_generate():
        raise NotApplicableError("does not generate")
    with_cache: dict[str, Any] = {"use_cache": True, "cache_implementation": kind}
    if kind == "dynamic":
        del with_cache["cache_implementation"]

    def change(model: nn.Module) -> float:
        return difference(
            generated(subject, model, use_cache=False),
            generated(subject, model, **with_cache),
        )

    of_base = subject.of_base(lambda: change(subject.fresh()))  # a copy: some keep positions for the next call
    if of_base > subject.tolerance:
        raise NotApplicableError(f"the cache changes the base model itself by {of_base:.1e}")
    apart = change(subject.adapted(init_weights=False))
    return passed_if(as_base(subject, of_base, apart), f"{apart:.1e}")


def saved_and_loaded(subject: Subject) -> Outcome:
    """A saved adapter on a fresh base model gives the same outputs bit by bit."""
    expected = subject.run(subject.visible)
    with tempfile.TemporaryDirectory() as folder:
        subject.visible.save_pretrained(folder)
        model = PeftModel.from_pretrained(subject.fresh(), folder).eval()
    outputs = subject.run(model)
    return passed_if(are_equal(expected, outputs), f"{difference(expected, outputs):.1e}")


def calibrated(subject: Subject) -> Outcome:
    """After calibration outputs are finite."""
    model = subject.adapted()
    calibrate(model, [subject.inputs.values])
    outputs = subject.run(model)
    return passed_if(are_finite(outputs), f"{difference(subject.outputs, outputs):.1e} from the base")


def structure(model: nn.Module) -> dict[str, Any]:
    """What `unload` must restore besides outputs."""
    return {
        name: (
            type(module).__name__,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    }


def unloaded(subject: Subject) -> Outcome:
    """The base model comes back bit by bit, and module by module."""
    model = subject.adapted(init_weights=False)
    subject.run(model)
    base = model.unload()
    outputs, before, after = subject.run(base), structure(subject.base), structure(base)
    changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
    if changed or list(subject.base.state_dict()) != list(base.state_dict()):
        return Outcome(WRONG, f"modules changed: {', '.join(sorted(changed)[:3])}")
    return passed_if(are_equal(subject.outputs, outputs), f"{difference(subject.outputs, outputs):.1e}")


def position_shift(subject: Subject) -> tuple[float, float] | None:
    """How far a shift of all positions moves outputs: those of the base model, and ours. A figure, no verdict."""
    if not takes_positions(subject):
        return None

    def change(model: nn.Module) -> float:
        outputs = (
            of_tokens(
                subject.run(model, positions_of(subject.inputs, shift)), subject.inputs.rows, subject.inputs.length
            )
            for shift in (0, SHIFT)
        )
        return difference(*outputs)

    try:
        found = change(subject.base), change(subject.visible)
    except Exception:
        return None
    return found if max(found) < float("inf") else None
