"""Rotary positions undone: against the rotation written out pair by pair, and what the operation refuses."""

import pytest
import torch

from ntk_attention import PrefixState, Rotation, feature_map, ntk_attention
from ntk_attention.ops.attention import context_block
from ntk_attention.ops.bundles import Tokens
from ntk_attention.ops.reference import merge, phi_input, prefix_block
from ntk_attention.ops.rotation import turned, unrotated
from ntk_attention.ops.triton import support
from tests.reference import relative_error

from .rotations import KINDS, make_rotation, pair_by_pair, places, rotated, undone
from .test_strides import check, make_inputs, make_mask

needs_triton = pytest.mark.skipif(support.triton is None, reason="needs Triton")
SIZES = [2, 5, 8, 16, 20]  # of heads


def x_of(L=5, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, L, d, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_turned(kind, d, batch):
    rotation = make_rotation(kind, 5, d, batch=batch)
    if rotation is None:
        assert d < 4
        return
    x = x_of(d=d)
    assert relative_error(unrotated(x, rotation), undone(x, rotation)) < 1e-15
    assert relative_error(turned(x, rotation, forward=True), pair_by_pair(x, rotation, 1)) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """Finite differences in fp64, and the transposed map."""
    rotation, x = make_rotation(kind, 3, 8, scale=1.3), x_of(L=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: unrotated(y, rotation), x)
    grad = x_of(L=3, seed=1)
    (actual,) = torch.autograd.grad(unrotated(x, rotation), x, grad)
    assert relative_error(actual, turned(grad, rotation, forward=True)) < 1e-15


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 0.6, 1.37])
@pytest.mark.parametrize("kind", KINDS)
def test_it_undoes_what_a_model_does(kind, scale, dtype, rounding):
    """Tables that a model has scaled (YaRN) and rounded; x is not rounded between."""
    angles = make_rotation(kind, 5, 16)
    P = angles.num_pairs
    cos, sin = ((scale * part).to(dtype) for part in (angles.table[..., :P], angles.table[..., P:]))
    rotation = Rotation.of(cos, sin, width=angles.width, start=angles.start)
    assert rotation.table.dtype == dtype
    x = x_of(d=16)
    y = rotated(x, cos.double(), sin.double(), rotation.width, rotation.start)
    assert relative_error(unrotated(y, rotation), x) < rounding


def test_arithmetic_is_in_full_precision():
    rotation = make_rotation("halves", 5, 8, torch.bfloat16)
    assert unrotated(x_of(dtype=torch.bfloat16), rotation).dtype == torch.float32
    assert unrotated(x_of(), rotation).dtype == torch.float64
    assert unrotated(x_of(dtype=torch.float32), make_rotation("halves", 5, 8)).dtype == torch.float64


def test_rows_of_a_table():
    rotation, x = make_rotation("partial", 7, 8, batch=2), x_of(L=7)
    part = rotation.rows(2, 4)
    assert part.table.is_contiguous()
    assert torch.equal(unrotated(x[:, :, 2:6], part), unrotated(x, rotation)[:, :, 2:6])


def test_where_pairs_stand():
    """The layouts of Llama, GPT-J, Phi and pictures with two axes."""
    assert places(2, 4, 0) == [(0, 2), (1, 3)]
    assert places(2, 2, 0) == [(0, 1), (2, 3)]
    assert places(1, 2, 3) == [(3, 4)]
    assert places(4, 4, 0) == [(0, 2), (1, 3), (4, 6), (5, 7)]


def test_what_phi_acts_on():
    rotation, x = make_rotation("halves", 5, 8, scale=1.2), x_of()
    assert torch.equal(phi_input(x, 0.5), 0.5 * x)
    assert relative_error(phi_input(x, 0.5, rotation), 0.5 * undone(x, rotation)) < 1e-15


# --- the operation ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, backend, dtype):
    """Against fp64: decoding, odd sizes, a mask, heads that share a state, and tables in the dtype of the queries."""
    for sizes in (
        {},
        {"L": 1},
        {"L": 33, "S": 40, "d": 20, "d_v": 5, "H_state": 2},
        {"H": 2, "H_state": 2, "d": 6, "S": 7},
    ):
        inputs, grad_out = make_inputs(dtype, **sizes)
        inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
        check(inputs, grad_out, backend, kind=kind, is_causal=inputs[1].shape[2] == 7)
    check(inputs, grad_out, backend, kind=kind, attn_mask=make_mask((1, 1, 7, 7)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phi", ["taylor", "positive_random"])
def test_other_feature_maps(phi, kind):
    inputs, grad_out = make_inputs(torch.float64, d=4, phi=phi)
    check(inputs, grad_out, phi=phi, kind=kind)


def make_state(H, d, phi="elu"):
    torch.manual_seed(3)
    r = feature_map(phi).num_features(d)
    return PrefixState(torch.randn(H, r, d).double(), torch.rand(H, r).double() + 0.1, feature_map=phi)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_of_all_positions_changes_nothing(kind, backend):
    """Keys and queries rotated on, as a model does it; without `rotation` the prefix sees another query."""
    x, key, value = x_of(), x_of(seed=1), x_of(seed=2)
    state = make_state(3, 8)
    P, (width, start) = make_rotation(kind, 5, 8).num_pairs, make_rotation(kind, 5, 8)[1:]
    frequencies = torch.rand(P, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def out(shift, free):
        angles = (torch.arange(5)[:, None] + shift) * frequencies
        cos, sin = angles.cos()[None], angles.sin()[None]
        query, keys = (rotated(y, cos, sin, width, start) for y in (x, key))
        rotation = Rotation.of(cos, sin, width=width, start=start) if free else None
        return ntk_attention(query, keys, value, state, is_causal=True, rotation=rotation, backend=backend)

    assert relative_error(out(1000, True), out(0, True)) < 1e-11
    assert relative_error(out(1000, False), out(0, False)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_prefix_is_that_of_a_query_without_positions(kind):
    """Real tokens see the rotated query, the prefix the other one."""
    x, key, value = x_of(), x_of(seed=1), x_of(seed=2)
    rotation, state = make_rotation(kind, 5, 8), make_state(3, 8)
    query = pair_by_pair(x, rotation, 1)
    out = ntk_attention(query, key, value, state, scale=0.25, rotation=rotation)
    expected = merge(context_block(Tokens(query, key, value, scale=0.25)), prefix_block(x, state, 0.5)).out
    assert relative_error(out, expected) < 1e-12


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_shift_changes_nothing_in_the_kernels(kind):
    """In bf16 up to its rounding."""
    d, device = 32, "cuda" if torch.cuda.is_available() else "cpu"
    x, key, value = (x_of(L=18, d=d, seed=seed).to(device) for seed in range(3))
    state = make_state(3, d)
    state = PrefixState(*(x.to(device, torch.float32) for x in (state.Z, state.k, state.log_scale)))
    P, (width, start) = make_rotation(kind, 18, d).num_pairs, make_rotation(kind, 18, d)[1:]
    frequencies = torch.rand(P, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def out(shift, backend, dtype, rows=slice(None)):
        angles = (torch.arange(18)[:, None] + shift) * frequencies
        cos, sin = angles.cos()[None].to(device), angles.sin()[None].to(device)
        query, keys = (rotated(y, cos, sin, width, start).to(dtype) for y in (x, key))
        rotation = Rotation.of(cos[:, rows], sin[:, rows], width=width, start=start)
        rotation = rotation._replace(table=rotation.table.to(dtype).contiguous())
        return ntk_attention(query[:, :, rows], keys, value.to(dtype), state, rotation=rotation, backend=backend)

    for rows in (slice(None), slice(-1, None)):
        expected = out(0, "eager", torch.float64, rows)
        for shift in (0, 1000):
            assert relative_error(out(shift, "triton", torch.bfloat16, rows), expected) < 2e-2


# --- refusals ---


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((5, 4), (5, 4)), {}, r"cos and sin must be \[B or 1, L, P\] alike, got \[5, 4\] and \[5, 4\]"),
        (((1, 5, 4), (1, 5, 3)), {}, r"alike, got \[1, 5, 4\] and \[1, 5, 3\]"),
        (((1, 5, 4), (1, 5, 4)), {"width": 3}, "the numbers of 4 pairs come in runs of an even width .* width of 3"),
        (((1, 5, 4), (1, 5, 4)), {"width": 6}, "got a width of 6 and the place 0"),
        (((1, 5, 4), (1, 5, 4)), {"width": 0}, "got a width of 0 and the place 0"),
        (((1, 5, 4), (1, 5, 4)), {"start": -1}, "got a width of 8 and the place -1"),
        (((1, 5, 0), (1, 5, 0)), {}, "the numbers of 0 pairs .* got a width of 0"),
    ],
)
def test_tables_that_are_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        Rotation.of(*map(torch.ones, shapes), **options)


TABLE = torch.ones(1, 5, 8)


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (Rotation(TABLE[0], 8), r"must be \[1 or 2, 5, 2 P\] for query \[2, 3, 5, 8\], .* got \[5, 8\]"),
        (Rotation(TABLE[:, :4], 8), r"got \[1, 4, 8\]"),
        (Rotation(TABLE.expand(3, 5, 8).contiguous(), 8), r"got \[3, 5, 8\]"),
        (Rotation(TABLE.expand(2, 5, 8), 8), "contiguous as Rotation.of makes it"),
        (Rotation(TABLE, 8, 1), "a rotation of 8 numbers from 1 on in runs of 8 does not fit head_dim 8"),
        (Rotation(torch.ones(1, 5, 10), 10), "a rotation of 10 numbers from 0 on in runs of 10 does not fit"),
        (Rotation(TABLE, 6), "in runs of 6 does not fit head_dim 8"),
        (Rotation(TABLE, 1), "in runs of 1 does not fit head_dim 8"),
        (Rotation(TABLE[..., :6].contiguous(), 3), "a rotation of 6 numbers from 0 on in runs of 3 does not fit"),
        (Rotation(TABLE[..., :0], 2), "a rotation of 0 numbers"),
        (Rotation(TABLE, 8, -2), "from -2 on"),
        (Rotation(TABLE.long(), 8), "floating point, got torch.int64"),
        (Rotation(TABLE.to("meta"), 8), "the table of a rotation is on meta, the query on cpu"),
    ],
)
def test_rotations_that_do_not_fit_a_query(rotation, message):
    query = x_of()
    with pytest.raises(ValueError, match=message):
        ntk_attention(query, query, query, make_state(3, 8), rotation=rotation)
