"""What a prefix state accepts and refuses."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ntk_attention import PrefixState, RowStates, feature_map, ntk_attention
from ntk_attention.ops.triton.support import INTERPRETED, triton
from ntk_attention.ops.triton.token_sums import SPLIT, elu_sums
from tests.reference import relative_error

from .test_strides import LAYOUTS, laid_out


def test_defaults():
    state = PrefixState(torch.zeros(2, 8, 4), torch.ones(2, 8))
    assert (state.num_heads, state.num_features) == (2, 8)
    assert torch.equal(state.log_scale, torch.zeros(2))
    assert state.feature_map.name == "elu"


def test_to():
    state = PrefixState(torch.zeros(2, 8, 4), torch.ones(2, 8), feature_map=feature_map("positive_random").bind(2))
    moved = state.to(torch.float64)
    assert moved.Z.dtype == moved.k.dtype == moved.log_scale.dtype == torch.float64
    assert state.Z.dtype == state.feature_map.projection.dtype == torch.float32
    assert moved.feature_map.projection.dtype == torch.float64


def test_signed_maps_need_only_a_positive_count():
    phi = feature_map("taylor", degree=2)
    k = -torch.ones(1, phi.num_features(3))
    k[0, 0] = 5.0
    PrefixState(torch.zeros(1, 10, 4), k, feature_map=phi)
    with pytest.raises(ValueError, match="k must be positive for the feature map 'taylor', got a minimum of -5"):
        PrefixState(torch.zeros(1, 10, 4), -k * 1.0, feature_map=phi)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(triton is None or (DEVICE == "cpu" and not INTERPRETED), reason="needs Triton")
@pytest.mark.parametrize(("m", "d", "d_v"), [(1, 16, 16), (700, 24, 40), (SPLIT + 5, 16, 32)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "heads outside"), (torch.bfloat16, "transposed")], ids=str
)
def test_the_kernel_of_the_sums(m, d, d_v, dtype, layout):
    """Against the features in float64, for rows that are not contiguous."""
    torch.manual_seed(0)
    shapes = (1, 3, m, d), (1, 3, m, d_v)
    keys, values = (laid_out(torch.randn(shape).to(DEVICE, dtype), LAYOUTS[layout])[0] for shape in shapes)
    Z, k = elu_sums(keys, values, 0.7)
    phi = feature_map("elu")(0.7 * keys.double())
    for actual, expected in ((Z, phi.transpose(1, 2) @ values.double()), (k, phi.sum(1))):
        assert (actual - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0.0, -200.0], ids=["usual", "tiny features"])
def test_a_gpu_makes_the_same_state(shift):
    """The kernel, and where every feature underflows what takes its place, against float64 on the CPU."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 3000, 32) + shift, torch.randn(2, 3000, 32)
    expected = PrefixState.from_prefix(keys.double(), values.double(), "elu", scale=1.0)
    half = PrefixState.from_prefix(keys[:, :1000].cuda(), values[:, :1000].cuda(), "elu", scale=1.0)
    actual = half.update(keys[:, 1000:].cuda(), values[:, 1000:].cuda(), scale=1.0).to("cpu", torch.float64)
    weight = torch.exp(actual.log_scale - expected.log_scale)[:, None]
    assert (actual.k * weight - expected.k).norm() < 1e-4 * expected.k.norm()
    assert (actual.Z * weight[..., None] - expected.Z).norm() < 1e-4 * expected.Z.norm()


def with_nan(*shape):
    x = torch.ones(*shape)
    x.view(-1)[1] = float("nan")
    return x


@pytest.mark.parametrize(
    ("Z", "k", "log_scale", "message"),
    [
        (torch.zeros(2, 8), torch.ones(2, 8), None, r"Z \[H, r, d_v\] and k \[H, r\], got Z \[2, 8\] and k \[2, 8\]"),
        (torch.zeros(2, 8, 4), torch.ones(2, 7), None, r"got Z \[2, 8, 4\] and k \[2, 7\]"),
        (torch.zeros(2, 8, 4), torch.ones(3, 8), None, r"got Z \[2, 8, 4\] and k \[3, 8\]"),
        (torch.zeros(2, 8, 4), torch.ones(2, 8), torch.zeros(3), r"log_scale must be \[H\] = \[2\], got \[3\]"),
        (torch.zeros(2, 8, 4, dtype=torch.long), torch.ones(2, 8), None, "Z must be floating point, got torch.int64"),
        (torch.zeros(2, 8, 4), torch.zeros(2, 8), None, "k must be positive for the feature map 'elu', .*minimum of 0"),
        (torch.zeros(2, 8, 4), -torch.ones(2, 8), None, "minimum of -1"),
        (with_nan(2, 8, 4), torch.ones(2, 8), None, "Z holds NaN or infinite values"),
        (torch.zeros(2, 8, 4), with_nan(2, 8), None, "k holds NaN or infinite values"),
        (torch.zeros(2, 8, 4), torch.ones(2, 8), with_nan(2), "log_scale holds NaN or infinite values"),
    ],
)
def test_bad_states(Z, k, log_scale, message):
    with pytest.raises(ValueError, match=message):
        PrefixState(Z, k, log_scale)


def test_unknown_map():
    with pytest.raises(ValueError, match="unknown feature map 'gelu'"):
        PrefixState(torch.zeros(2, 8, 4), torch.ones(2, 8), feature_map="gelu")


MAPS = {
    "elu": {},
    "taylor": {"degree": 2},
    "positive_random": {"num_features": 40, "seed": 3},
}


def prefix(m=50, H=2, d=6, d_v=5, size=1.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(H, m, n, generator=generator, dtype=torch.float64) for n in (d, d_v))
    return (size * keys).to(dtype), values.to(dtype)


def plain(state):
    """Z e^b and k e^b in float64."""
    factor = state.log_scale.double().exp()
    return state.Z.double() * factor[:, None, None], state.k.double() * factor[:, None]


def assert_same(actual, expected, tolerance):
    """States are equal up to the size of their largest entries, whatever their log scales."""
    peak = torch.maximum(actual.log_scale, expected.log_scale).double()
    for state in (actual, expected):
        assert torch.isfinite(state.Z).all()
        assert torch.isfinite(state.k).all()
    for a, e in zip(actual._at_scale(peak), expected._at_scale(peak), strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("name", MAPS)
def test_a_prefix_becomes_the_sums_of_the_paper(name):
    keys, values = prefix()
    state = PrefixState.from_prefix(keys, values, feature_map(name, **MAPS[name]), chunk_size=7)
    phi = state.feature_map(6**-0.25 * keys)  # [H, m, r]
    for actual, expected in zip(plain(state), (phi.mT @ values, phi.sum(dim=1)), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12 * expected.abs().max())


def test_the_state_stands_for_attention_to_the_prefix():
    """Small keys, where a polynomial of degree 4 is exp: the output is that of attention to prefix and tokens."""
    keys, values = prefix(m=300, d=4, d_v=4, size=0.5)
    query, key, value = (0.5 * torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, torch.cat([keys[None], key], dim=2), torch.cat([values[None], value], dim=2)
    )
    state = PrefixState.from_prefix(keys, values, feature_map("taylor", degree=4))
    assert (ntk_attention(query, key, value, state) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("size", [0.01, 1.0, 60.0], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_parts_make_the_whole(name, size):
    """Streaming in float32, sums of states and one pass in float64 agree, also for logits that exp cannot hold."""
    keys, values = prefix(m=200, size=size)
    phi = feature_map(name, **MAPS[name])
    whole = PrefixState.from_prefix(keys, values, phi)
    first = PrefixState.from_prefix(keys[:, :70].float(), values[:, :70].float(), phi, chunk_size=16)
    streamed = first.update(keys[:, 70:71].float(), values[:, 70:71].float())
    streamed = streamed.update(keys[:, 71:].float(), values[:, 71:].float(), chunk_size=50)
    assert streamed.Z.dtype == torch.float32
    # e^x has the relative rounding error of x, and the exponents of random features reach 60^2
    tolerance = 3e-4 if name == "positive_random" and size > 1 else 3e-6
    assert_same(streamed, whole, tolerance)
    rest = PrefixState.from_prefix(keys[:, 70:], values[:, 70:], phi)
    assert_same(PrefixState.from_prefix(keys[:, :70], values[:, :70], phi) + rest, whole, 1e-12)


def reduce_one_part(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    keys, values = prefix(m=100, size=4.0)
    part = slice(0, 30) if rank == 0 else slice(30, 100)
    state = PrefixState.from_prefix(keys[:, part], values[:, part], "taylor")
    if rank == 1:  # as those of the other one, but not in memory
        state = PrefixState(
            *(x.movedim(0, -1).contiguous().movedim(-1, 0) for x in (state.Z, state.k, state.log_scale)),
            state.feature_map,
        )
    state = state.all_reduce()
    torch.save((state.Z, state.k, state.log_scale), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_state_of_one(tmp_path):
    mp.spawn(reduce_one_part, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same(PrefixState(*first, "taylor"), PrefixState.from_prefix(*prefix(m=100, size=4.0), "taylor"), 1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["elu", "taylor", "positive_random"])
def test_states_of_strided_tokens(name, layout):
    """Made of them, extended by them and added, from a state of any strides."""
    torch.manual_seed(0)
    keys, values = (laid_out(torch.randn(1, 2, 60, 6, dtype=torch.float64), LAYOUTS[layout])[0] for _ in range(2))
    phi = feature_map(name).bind(6)
    first, rest = (keys[:, :20], values[:, :20]), (keys[:, 20:], values[:, 20:])
    expected = PrefixState.from_prefix(keys.contiguous(), values.contiguous(), phi)
    state = PrefixState.from_prefix(*first, phi)
    moved = [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in (state.Z, state.k, state.log_scale)]
    state = PrefixState(*moved, state.feature_map)
    for made in (PrefixState.from_prefix(keys, values, phi), state.update(*rest, chunk_size=7)):
        share = torch.exp(made.log_scale - expected.log_scale)
        assert relative_error(made.Z * share[:, None, None], expected.Z) < 1e-12
        assert relative_error(made.k * share[:, None], expected.k) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v: (k[0], v), r"keys \[H, m, d\] and values \[H, m, d_v\], got \[50, 6\] and \[2, 50, 5\]"),
        (lambda k, v: (k[:1], v), r"got \[1, 50, 6\] and \[2, 50, 5\]"),
        (lambda k, v: (k[:, :0], v[:, :0]), "at least one token"),
        (lambda k, v: (k.masked_fill(k > 2, float("nan")), v), "keys hold NaN"),
        (lambda k, v: (k, v / 0), "values hold NaN or infinite"),
        (lambda k, v: (k.long(), v), "keys must be floating point"),
        (lambda k, v: (k[:0], v[:0]), r"at least one head .*, got keys \[0, 50, 6\] and values \[0, 50, 5\]"),
        (lambda k, v: (k, v[..., :0]), r"sizes of at least one, got keys \[2, 50, 6\] and values \[2, 50, 0\]"),
        (lambda k, v: (k, v.to("meta")), "on one device, got cpu and meta"),
    ],
)
def test_a_bad_prefix_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PrefixState.from_prefix(*change(*prefix()))


def test_a_state_in_parts_that_do_not_fit_is_refused():
    Z, k, b = torch.zeros(2, 8, 4), torch.ones(2, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="a state lies on one device, got Z on cpu and k on meta"):
        PrefixState(Z, k.to("meta"))
    stack, index = [Z[None], k[None], b[None]], torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"needs Z \[A, H, r, d_v\], .*, got \[2, 8, 4\], \[1, 2, 8\] and \[1, 2\]"):
        RowStates(Z, *stack[1:], feature_map("elu"), index)
    with pytest.raises(ValueError, match=r"got \[1, 2, 8, 4\], \[1, 2, 8\] and \[2\]"):
        RowStates(*stack[:2], b, feature_map("elu"), index)
    with pytest.raises(ValueError, match="a stack lies on one device, got Z on cpu and log_scale on meta"):
        RowStates(*stack[:2], b[None].to("meta"), feature_map("elu"), index)
    with pytest.raises(ValueError, match=r"index must be int32 \[B\] on cpu, got torch.int64 \[3\] on cpu"):
        RowStates(*stack, feature_map("elu"), index.long())
    with pytest.raises(ValueError, match="a stack needs at least one state, got none"):
        RowStates.stack([], index)


def test_states_that_do_not_add_are_refused():
    keys, values = prefix()
    state = PrefixState.from_prefix(keys, values, "taylor")
    with pytest.raises(ValueError, match="only states of one shape and feature map add"):
        state + PrefixState.from_prefix(keys, values, "elu")
    maps = [feature_map("positive_random", num_features=8, seed=seed) for seed in (0, 1)]
    first, second = (PrefixState.from_prefix(keys, values, phi) for phi in maps)
    with pytest.raises(ValueError, match="only states of one shape"):
        first + second
    with pytest.raises(ValueError, match=r"the state has 2 heads and values of size 5, got keys \[1, 50, 6\]"):
        state.update(keys[:1], values[:1])
    with pytest.raises(ValueError, match="the state has r = 28 features, but 'taylor' makes 21 of keys of size 5"):
        state.update(keys[..., :5], values)
    with pytest.raises(ValueError, match="without the constant feature"):
        PrefixState.from_prefix(keys, values, feature_map("elu", constant=True))
