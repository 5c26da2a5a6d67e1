"""Inputs, masks, states and gradients of any strides: outputs and all gradients against contiguous ones in fp64.

What lies between the entries of a strided tensor is NaN (True in a mask): a kernel that reads past its strides shows.
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk_attention import LayerPrefix, PrefixState, RowStates, feature_map, ntk_attention
from ntk_attention.ops import sdpa
from ntk_attention.ops.attention import attend, context_block, exact_block
from ntk_attention.ops.bundles import Prefixes, Tokens
from ntk_attention.ops.reference import prefix_block
from ntk_attention.ops.triton import support
from tests.reference import relative_error

from .paths import has_kernels, merge_always
from .rotations import KINDS, in_double, make_rotation

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(support.triton is None, reason="needs Triton")
NAMES = ("query", "key", "value", "Z", "k", "b")
# In half precision: three rounding units; in our kernels six, and the interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


class Layout(NamedTuple):
    """How a tensor lies in memory, dimension by dimension; what there is too much of is not looked at."""

    order: tuple[int, ...]  # of the dimensions, the one with the largest stride first
    step: tuple[int, ...] = (1, 1, 1, 1)  # between entries
    before: tuple[int, ...] = (0, 0, 0, 0)  # entries in front of the first one, and behind the last one
    repeated: tuple[bool, ...] = (False, False, False, False)  # one entry for all: stride 0


INSIDE = (0, 1, 2, 3)
LAYOUTS = {
    "contiguous": Layout(INSIDE),
    "heads outside": Layout((0, 2, 1, 3)),
    "transposed": Layout((0, 1, 3, 2)),
    "heads last": Layout((0, 2, 3, 1)),
    "reversed": Layout((3, 2, 1, 0)),
    "sliced": Layout(INSIDE, before=(1, 1, 1, 3)),
    "rows of odd length": Layout((0, 2, 1, 3), before=(0, 0, 0, 1)),
    "every other entry": Layout(INSIDE, step=(1, 1, 1, 2)),
    "every other row": Layout(INSIDE, step=(2, 1, 2, 1)),
    "one for the batch": Layout(INSIDE, repeated=(True, False, False, False)),
    "one for all heads": Layout(INSIDE, repeated=(False, True, False, False)),
    "one for all rows": Layout(INSIDE, repeated=(False, False, True, False)),
    "one in each row": Layout(INSIDE, repeated=(False, False, False, True)),
    "one for all, sliced": Layout(INSIDE, before=(0, 1, 2, 1), repeated=(True, True, False, False)),
    "one number": Layout(INSIDE, repeated=(True, True, True, True)),
}


def laid_out(x, layout):
    """x in that layout; where entries are repeated, with the first of them."""
    dims = range(x.dim())
    own = x[tuple(slice(1 if layout.repeated[i] else None) for i in dims)]
    order = [i for i in layout.order if i < x.dim()]
    outer = [2 * layout.before[i] + layout.step[i] * own.shape[i] for i in order]
    memory = torch.full(outer, True if x.dtype == torch.bool else math.nan, dtype=x.dtype, device=x.device)
    memory = memory.permute([order.index(i) for i in dims])
    spans = ((layout.before[i], layout.step[i], own.shape[i]) for i in dims)
    view = memory[tuple(slice(first, first + step * size, step) for first, step, size in spans)]
    return view.copy_(own).expand_as(x)


def windows(x):
    """Rows that overlap: each begins one entry behind the one before it."""
    L, d = x.shape[-2:]
    return torch.cat([x[..., 0], x[..., 0, :]], dim=-1)[..., : L + d - 1].contiguous().unfold(-1, d, 1)


def make_inputs(dtype, B=2, H=4, H_kv=2, H_state=4, L=7, S=9, d=8, d_v=8, phi="elu", seed=0):
    """query, key, value, Z, k, b, the state at least in float32, and a gradient of the output."""
    torch.manual_seed(seed)
    r = feature_map(phi).bind(d).num_features(d)
    shapes = (B, H, L, d), (B, H_kv, S, d), (B, H_kv, S, d_v), (H_state, r, d_v), (H_state, r), (H_state,)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    inputs[4] = inputs[4].abs() + 0.05
    dtypes = [dtype] * 3 + [torch.promote_types(dtype, torch.float32)] * 3
    inputs = [x.to(DEVICE, as_given) for x, as_given in zip(inputs, dtypes, strict=True)]
    return inputs, torch.randn(B, H, L, d_v, dtype=torch.float64).to(DEVICE, dtype)


def outputs_and_gradients(inputs, grad_out, backend, phi="elu", **options):
    """Of leaves in the strides of the inputs; without gradients where there are none."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    state = PrefixState.trusted(*leaves[3:], feature_map(phi))
    out = ntk_attention(*leaves[:3], state, enable_gqa=True, backend=backend, **options)
    return [out, *(torch.autograd.grad(out, leaves, grad_out) if torch.is_grad_enabled() else ())]


def check(inputs, grad_out, backend="auto", attn_mask=None, kind=None, **options):
    """One backend on strided tensors against the eager one on contiguous ones in fp64, with a kind of rotation."""
    dtype, (B, _, L, d) = inputs[0].dtype, inputs[0].shape
    rotation = make_rotation(kind, L, d, dtype, B, device=DEVICE)
    actual = outputs_and_gradients(inputs, grad_out, backend, attn_mask=attn_mask, rotation=rotation, **options)
    as_double = [x.double().contiguous() for x in (*inputs, grad_out)]
    if attn_mask is not None:
        attn_mask = attn_mask.contiguous() if attn_mask.dtype == torch.bool else attn_mask.double().contiguous()
    options |= {"attn_mask": attn_mask, "rotation": in_double(rotation)}
    expected = outputs_and_gradients(as_double[:6], as_double[6], "eager", **options)
    tolerance = TOLERANCE[dtype] * (2 if has_kernels(inputs[0], inputs[2]) else 1)
    # A gradient that cancels to nothing is held against the terms that it sums.
    size = grad_out.shape[-1] ** 0.5 * max(1.0, expected[0].abs().max().item()) * (1.0 if dtype.itemsize == 2 else 0.1)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=False):
        assert a.dtype == (dtype if name in ("out", *NAMES[:3]) else inputs[3].dtype)
        terms = grad_out.shape[0] * grad_out.shape[2] if name in ("Z", "k", "b") else 1
        floor = 0.0 if name == "out" else size * terms**0.5
        assert relative_error(a, e, floor) < tolerance, name


CASES = {  # dtype, sizes, options
    "eager": (torch.float64, {}, {"backend": "eager"}),
    "sdpa": (torch.float64, {}, {"backend": "sdpa"}),
    "sdpa, causal, in float32": (torch.float32, {"S": 7, "d_v": 5}, {"backend": "sdpa", "is_causal": True}),
    "sdpa, in bfloat16": (torch.bfloat16, {"L": 33, "S": 40, "d": 20, "d_v": 16}, {"backend": "sdpa"}),
    "in torch's operations": (torch.float32, {"H_state": 2}, {"is_causal": True}),
    "in torch's operations, fp64": (torch.float64, {"d": 5, "d_v": 3}, {}),
    "decoding": (torch.float32, {"L": 1}, {}),
    "one of each": (torch.float64, {"B": 1, "H": 1, "H_kv": 1, "H_state": 1, "L": 1, "S": 1}, {"backend": "sdpa"}),
    "heads of size one": (torch.float64, {"d": 1, "d_v": 1, "S": 5}, {}),
    "taylor": (torch.float64, {"d": 4, "phi": "taylor"}, {"phi": "taylor"}),
    "random": (torch.float64, {"phi": "positive_random"}, {"phi": "positive_random"}),
    "halves": (torch.float32, {"H_state": 2}, {"is_causal": True, "kind": "halves"}),
    "neighbours": (torch.float64, {"d": 6}, {"backend": "sdpa", "kind": "neighbours"}),
    "partial, decoding": (torch.float32, {"L": 1}, {"kind": "partial"}),
}
TENSORS = (*NAMES, "grad_out", "attn_mask")


def with_one_in(layout, which, case):
    """The tensors of a case, one of them laid out: six inputs, a gradient and the options."""
    dtype, sizes, options = case
    inputs, grad_out = make_inputs(dtype, **sizes)
    tensors = [*inputs, grad_out]
    if which == 7:
        mask = laid_out(make_mask((*grad_out.shape[:3], inputs[1].shape[2])), layout)
        options = {**options, "is_causal": False, "attn_mask": mask}
    else:
        tensors[which] = laid_out(tensors[which], layout)
    return tensors[:6], tensors[6], options


def make_mask(shape, dtype=torch.bool):
    generator = torch.Generator().manual_seed(7)
    if dtype == torch.bool:
        return (torch.rand(shape, generator=generator) > 0.4).to(DEVICE)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("which", range(8), ids=TENSORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_one_tensor(case, layout, which):
    inputs, grad_out, options = with_one_in(LAYOUTS[layout], which, CASES[case])
    check(inputs, grad_out, **options)


TRITON = {  # the same for the kernels
    "fused": (torch.bfloat16, {}, {"backend": "triton"}),
    "fp16": (torch.float16, {"H_state": 1, "d": 24}, {"backend": "triton", "is_causal": True}),
    "random": (torch.bfloat16, {"phi": "positive_random"}, {"backend": "triton", "phi": "positive_random"}),
    "merged": (torch.bfloat16, {}, {"backend": "auto", "is_causal": True}),
    "fused, halves": (torch.bfloat16, {}, {"backend": "triton", "kind": "halves"}),
    "merged, neighbours": (torch.bfloat16, {}, {"backend": "auto", "is_causal": True, "kind": "neighbours"}),
}
SMALL = {"B": 1, "H": 2, "H_kv": 1, "H_state": 2, "L": 18, "S": 21, "d": 16, "d_v": 16}


@needs_triton
@pytest.mark.parametrize("which", range(8), ids=TENSORS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "every other row", "one number"])
@pytest.mark.parametrize("case", TRITON)
def test_kernels(case, layout, which, monkeypatch):
    merge_always(monkeypatch)
    dtype, sizes, options = TRITON[case]
    inputs, grad_out, options = with_one_in(LAYOUTS[layout], which, (dtype, SMALL | sizes, options))
    assert has_kernels(inputs[0], inputs[2])
    check(inputs, grad_out, **options)


@needs_triton
@pytest.mark.parametrize(("phi", "kind"), [("elu", None), ("elu", "partial"), ("positive_random", None)])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "every other row", "one number"])
def test_decoding_kernel(layout, phi, kind):
    case = torch.bfloat16, {**SMALL, "L": 2, "S": 150, "phi": phi}, {"backend": "triton", "phi": phi, "kind": kind}
    for which in (*range(6), 7):
        inputs, grad_out, options = with_one_in(LAYOUTS[layout], which, case)
        with torch.no_grad():
            check(inputs, grad_out, **options)


MASKS = {"[B, H, L, S]": (2, 4, 7, 9), "[B, 1, L, S]": (2, 1, 7, 9), "[1, 1, L, S]": (1, 1, 7, 9), "[L, S]": (7, 9)}
MASKS |= {"[H, L, S]": (4, 7, 9), "[B, 1, 1, S]": (2, 1, 1, 9), "[H, L, 1]": (4, 7, 1), "[S]": (9,), "[]": ()}


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_masks(backend, dtype, shape):
    """Of every shape, where one of fewer dimensions is a slice, at full length and in decoding."""
    inputs, grad_out = make_inputs(torch.float32 if dtype == torch.bool else dtype)
    missing = (0,) * (4 - len(MASKS[shape]))
    for layout in ("contiguous", "transposed", "heads last", "sliced", "one for all rows", "one in each row"):
        mask = laid_out(make_mask((1,) * len(missing) + MASKS[shape], dtype), LAYOUTS[layout])[missing]
        for rows in (slice(None), slice(-1, None)):
            cut = mask[..., rows, :] if mask.dim() > 1 else mask
            check([inputs[0][:, :, rows], *inputs[1:]], grad_out[:, :, rows], backend, attn_mask=cut)


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2, 6], ids=["query", "key", "value", "grad_out"])
def test_rows_that_overlap(which, dtype, backend):
    inputs, grad_out = make_inputs(dtype, L=5, S=7)
    tensors = [*inputs, grad_out]
    tensors[which] = windows(tensors[which])
    check(tensors[:6], tensors[6], backend)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto", "triton"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda out: out.sum(),
        lambda out: out.mean(dim=(1, 3)).square().sum(),
        lambda out: (out.transpose(-1, -2).flatten(2) * torch.arange(out[0, 0].numel(), device=out.device)).sum(),
        lambda out: out[:, 1:, ::2, 3:].sum(),
    ],
    ids=["sum", "mean", "transposed", "sliced"],
)
def test_losses(loss, backend):
    """Gradients as autograd makes them, from an output of a query with its heads outside."""
    dtype = torch.bfloat16 if backend == "triton" else torch.float32
    inputs, _ = make_inputs(dtype, d=16, d_v=16)
    inputs[0] = laid_out(inputs[0], LAYOUTS["heads outside"])

    def gradients(inputs, backend):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = ntk_attention(*leaves[:3], PrefixState(*leaves[3:]), enable_gqa=True, backend=backend)
        return torch.autograd.grad(loss(out.double()), leaves)

    expected = gradients([x.double().contiguous() for x in inputs], "eager")
    for a, e in zip(gradients(inputs, backend), expected, strict=True):
        assert relative_error(a, e, 1.0) < (3e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto", "triton"])
def test_lazily_negated_views(backend):
    """As the imaginary part of a conjugate is one: its sign is a bit that only torch's dispatcher knows of."""
    inputs, grad_out = make_inputs(torch.bfloat16 if backend == "triton" else torch.float32, d=16, d_v=16)
    inputs, grad_out = [torch._neg_view(-x) for x in inputs], torch._neg_view(-grad_out)
    assert inputs[0].is_neg()
    check(inputs, grad_out, backend)


def layouts(draw):
    """Half of them contiguous."""
    if draw(st.booleans()):
        return LAYOUTS["contiguous"]
    return Layout(
        draw(st.permutations(range(4)).map(tuple)),
        *(draw(st.tuples(*(st.sampled_from(values) for _ in range(4)))) for values in ((1, 1, 2), (0, 0, 1))),
        draw(st.tuples(*(st.sampled_from((False, False, False, True)) for _ in range(4)))),
    )


@st.composite
def strided(draw, kernels):
    """A case in which every tensor lies in memory in its own way."""
    groups, H_kv = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    sizes = {
        "B": draw(st.integers(1, 3)),
        "H": groups * H_kv,
        "H_kv": H_kv,
        "H_state": draw(st.sampled_from([H_kv, groups * H_kv])),
        "L": draw(st.sampled_from([1, 2, 7, 18])),
        "S": draw(st.sampled_from([1, 2, 9, 33])),
        "d": draw(st.sampled_from([16, 24] if kernels else [1, 3, 8, 20])),
        "d_v": draw(st.sampled_from([16, 32] if kernels else [1, 5, 8, 24])),
    }
    dtype = draw(st.sampled_from([torch.bfloat16] if kernels else [torch.float32, torch.float64, torch.bfloat16]))
    backend = "triton" if kernels else draw(st.sampled_from(["eager", "sdpa", "auto"]))
    inputs, grad_out = make_inputs(dtype, **sizes, seed=draw(st.integers(0, 99)))
    tensors = [laid_out(x, layouts(draw)) for x in (*inputs, grad_out)]
    options = {"backend": backend, "kind": draw(st.sampled_from([None, None, *KINDS]))}
    kind = draw(st.sampled_from([None, "causal", torch.bool] if kernels else [None, "causal", torch.bool, dtype]))
    if kind in (None, "causal"):
        return tensors[:6], tensors[6], {**options, "is_causal": kind == "causal"}
    target = sizes["B"], sizes["H"], sizes["L"], sizes["S"]
    shape = tuple(draw(st.sampled_from([1, n])) for n in target)
    mask = laid_out(make_mask(shape, kind), layouts(draw))
    leading = draw(st.integers(0, next(i for i in range(3) if i == 2 or shape[i] > 1)))
    return tensors[:6], tensors[6], {**options, "attn_mask": mask[(0,) * leading]}


SWEEP = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=250, **SWEEP)
@given(strided(kernels=False))
def test_every_tensor_in_its_own_strides(case):
    check(*case[:2], **case[2])


@needs_triton
@settings(max_examples=20, **SWEEP)
@given(strided(kernels=True))
def test_every_tensor_in_its_own_strides_in_the_kernels(case):
    check(*case[:2], **case[2])


@pytest.mark.parametrize("L", [1, 18])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "every other row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_whose_rows_have_different_states(dtype, layout, L):
    inputs, _ = make_inputs(dtype, B=3, H=2, H_kv=1, H_state=2, L=L, d=16, d_v=16)
    stack = [torch.stack([x, 2 * x.flip(0)]) for x in inputs[3:]]
    index = torch.tensor([1, 0, -1], dtype=torch.int32, device=DEVICE)
    strided = [laid_out(x, LAYOUTS[layout]) for x in stack]
    states = RowStates(*strided, feature_map("elu"), index.repeat_interleave(2)[::2])
    out = ntk_attention(*inputs[:3], states, enable_gqa=True)
    states = RowStates(*(x.double() for x in stack), feature_map("elu"), index)
    expected = ntk_attention(*(x.double() for x in inputs[:3]), states, enable_gqa=True, backend="eager")
    assert relative_error(out, expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("beside", ["a state", "a softcap", "a sink", "tokens"])
def test_what_stands_beside_a_state(beside, layout):
    inputs, grad_out = make_inputs(torch.float64)
    sink, tokens = torch.randn(4, device=DEVICE), torch.randn(2, 1, 2, 5, 8, device=DEVICE).double()
    tensors = [laid_out(x, LAYOUTS[layout]) for x in (*inputs, grad_out, sink, *tokens)]

    def run(tensors, backend):
        *leaves, grad_out, sink, keys, values = (x.detach().requires_grad_() for x in tensors)
        states = [PrefixState.trusted(*leaves[3:], feature_map("elu"))] * (2 if beside == "a state" else 1)
        prefixes = Prefixes(
            states,
            0.6,
            exact=LayerPrefix(keys[0], values[0]) if beside == "tokens" else None,
            sink=sink if beside == "a sink" else None,
        )
        softcap = 5.0 if beside == "a softcap" else None
        out = attend(Tokens(*leaves[:3], scale=0.36), prefixes, softcap=softcap, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, grad_out)]

    for a, e in zip(run(tensors, "auto"), run([x.contiguous() for x in tensors], "eager"), strict=True):
        assert relative_error(a, e, 0.1) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks(layout, dtype):
    """Of the state, of tokens that are all there, with a kernel and without, and of the real tokens."""
    inputs, _ = make_inputs(dtype)
    strided = [laid_out(x, LAYOUTS[layout]) for x in inputs]
    in_double = [x.double().contiguous() for x in strided]

    def blocks(tensors):
        query, key, value, *state = tensors
        prefix = LayerPrefix(key[0], value[0])
        weights = laid_out(torch.arange(18.0, device=DEVICE).view(1, 1, 2, 9), LAYOUTS[layout])[0, 0]
        yield prefix_block(query, PrefixState.trusted(*state, feature_map("elu")), 0.6)
        yield exact_block(query, prefix, 0.36)
        yield exact_block(query, prefix._replace(log_weights=weights), 0.36)
        yield context_block(Tokens(query, key, value, scale=0.36))

    for actual, expected in zip(blocks(strided), blocks(in_double), strict=True):
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e, 0.1) < TOLERANCE[dtype]


READABLE = ("contiguous", "heads outside", "every other row")
READABLE_ON_A_CPU = ("sliced", "rows of odd length", "one for the batch", "one for all heads", "one for all, sliced")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_made_only_where_they_must(layout):
    x = laid_out(torch.randn(2, 4, 6, 8, device=DEVICE), LAYOUTS[layout])
    is_readable = layout in READABLE or (DEVICE == "cpu" and layout in READABLE_ON_A_CPU)
    assert (sdpa.readable(x) is x) == is_readable
    assert torch.equal(sdpa.readable(x), x)


def test_an_expanded_mask_takes_the_memory_of_what_it_repeats():
    query = torch.zeros(2, 4, 7, 8)
    for mask in (torch.ones(7, 9, dtype=torch.bool), torch.zeros(7, 9)):
        assert sdpa.additive_mask(mask.expand(2, 4, 7, 9), query).shape == (1, 1, 7, 9)
        assert sdpa.additive_mask(mask[:, :1].expand(2, 4, 7, 9), query).shape == (1, 1, 7, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=str
)
def test_kernels_of_the_library(kernel, layout, dtype):
    """One after another, at sizes that are aligned and at others."""
    for sizes in ({"L": 64, "S": 64, "d": 64, "d_v": 64}, {"L": 33, "S": 65, "d": 40, "d_v": 24}):
        inputs, grad_out = make_inputs(dtype, **sizes)
        mask = laid_out(make_mask((2, 4, sizes["L"], sizes["S"]), dtype), LAYOUTS[layout])
        for which in (*range(7), None):
            tensors = [*inputs, grad_out]
            if which is not None:
                tensors[which] = laid_out(tensors[which], LAYOUTS[layout])
            with sdpa_kernel(kernel):
                check(tensors[:6], tensors[6], "sdpa", attn_mask=mask if which is None else None)
