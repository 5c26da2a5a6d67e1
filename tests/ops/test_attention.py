"""The operation against fp64: outputs and all gradients, at random sizes and scales."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ntk_attention import PrefixState, feature_map, ntk_attention
from tests.reference import elu_phi, in_logarithms, log_elu_phi, naive, relative_error

from .rotations import KINDS, make_rotation, undone

NAMES = ("query", "key", "value", "Z", "k", "b")
# In half precision: three rounding units.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


def make_case(seed, B=2, H=4, H_kv=2, H_state=4, L=7, S=9, d=8, d_v=8, dtype=torch.float64, phi="elu"):
    """query, key, value, Z, k, b in `dtype`, the state's always at least float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    phi = feature_map(phi)
    r = phi.num_features(d)
    state_dtype = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (normal(B, H, L, d), normal(B, H_kv, S, d), normal(B, H_kv, S, d_v)))
    k_state = (normal(H_state, r).abs() + 0.05) * phi.nonnegative(d)
    state = (normal(H_state, r, d_v), k_state, normal(H_state))
    return [q, k, v, *(x.to(state_dtype) for x in state)]


def outputs_and_gradients(function, inputs, grad_out):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


def operation(backend, phi="elu", **options):
    def run(q, k, v, Z, kk, b):
        return ntk_attention(q, k, v, PrefixState(Z, kk, b, phi), enable_gqa=True, backend=backend, **options)

    return run


def make_mask(kind, seed, B, H, L, S, dtype):
    generator = torch.Generator().manual_seed(seed)
    if kind == "bool":
        return torch.rand(B, 1, L, S, generator=generator) > 0.4
    if kind == "additive":
        return torch.randn(H, L, S, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "padding":  # as transformers makes it: causal, the first keys of an item hidden by the smallest number
        hidden = torch.arange(S)[None, :] < torch.arange(B)[:, None]
        visible = torch.ones(L, S, dtype=torch.bool).tril(max(S - L, 0)) & ~hidden[:, None, None, :]
        # that of float16, -65504, does not swallow a logit, so that such rows differ by dtype: -inf there
        smallest = -math.inf if dtype == torch.float16 else torch.finfo(dtype).min
        return torch.zeros(B, 1, L, S, dtype=dtype).masked_fill(~visible, smallest)
    return None


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "additive"])
@pytest.mark.parametrize("H_state", [4, 2])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_backends_are_the_printed_formula(backend, mask, H_state, kind):
    """fp64 against Algorithm 2, written out; with positions, phi of the query without them."""
    inputs = make_case(0, H_state=H_state)
    options = {"is_causal": True} if mask == "causal" else {}
    if mask in ("bool", "additive"):
        m = make_mask(mask, 1, 2, 4, 7, 9, torch.float64)
        options = {"attn_mask": m | (torch.arange(9) == 0)} if mask == "bool" else {"attn_mask": m}
    reference = {"mask" if k == "attn_mask" else k: v for k, v in options.items()}
    grad = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    rotation = make_rotation(kind, 7, 8, batch=2, scale=1.2)

    def phi(x):
        return elu_phi(undone(x, rotation))

    expected = outputs_and_gradients(lambda *x: naive(*x, phi, **reference), inputs, grad)
    actual = outputs_and_gradients(operation(backend, rotation=rotation, **options), inputs, grad)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-12


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "B": st.integers(1, 3),
        "groups": st.sampled_from([1, 2, 3]),
        "H_kv": st.sampled_from([1, 2]),
        "kv_state": st.booleans(),
        "L": st.sampled_from([1, 2, 7, 16, 33]),
        "S": st.sampled_from([1, 2, 9, 16, 63]),
        "d": st.sampled_from([1, 3, 8, 16, 20]),
        "d_v": st.sampled_from([1, 5, 8, 16, 24]),
        "mask": st.sampled_from([None, "causal", "bool", "additive", "padding"]),
        "scale": st.sampled_from([None, 1.0, 0.125]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
        "backend": st.sampled_from(["eager", "sdpa", "auto"]),
        "log_scale": st.sampled_from([0.0, 0.0, 80.0, -80.0]),
    }
)


@settings(max_examples=600, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases)
def test_random_cases_against_fp64(case):
    """Every dtype against the eager backend in fp64 on the same (rounded) inputs."""
    B, L, S, H_kv, dtype = (case[name] for name in ("B", "L", "S", "H_kv", "dtype"))
    H = H_kv * case["groups"]
    inputs = make_case(
        case["seed"], B, H, H_kv, H_kv if case["kv_state"] else H, L, S, case["d"], case["d_v"], dtype=dtype
    )
    inputs[-1] += case["log_scale"]
    mask = make_mask(case["mask"], case["seed"], B, H, L, S, dtype)
    wide_mask = mask
    if mask is not None and mask.dtype != torch.bool:  # the smallest number of one dtype is not that of another
        wide_mask = mask.double().masked_fill(mask == torch.finfo(dtype).min, torch.finfo(torch.float64).min)
    options = {"is_causal": case["mask"] == "causal", "scale": case["scale"]}
    grad = torch.randn(B, H, L, case["d_v"], generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = outputs_and_gradients(
        operation("eager", attn_mask=wide_mask, **options), [x.double() for x in inputs], grad.double()
    )
    actual = outputs_and_gradients(operation(case["backend"], attn_mask=mask, **options), inputs, grad)
    assert actual[0].dtype == dtype
    # Gradients are sums over d_v of terms of the size of the output, rounded to its dtype: one that cancels to nothing
    # is held against that size, in full precision against a tenth of it.
    size = case["d_v"] ** 0.5 * max(1.0, expected[0].abs().max().item()) * (1.0 if dtype.itemsize == 2 else 0.1)
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        rows = B * L * case["groups"] if name in ("Z", "k", "b") else 1  # that the gradient of a state sums over
        floor = 0.0 if name == "out" else size * rows**0.5
        assert relative_error(a, e, floor) < TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_scale", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("sign", [-1, 1], ids=["down", "up"])
@pytest.mark.parametrize("in_state", [False, True], ids=["log_scale", "values"])
def test_logits_of_ten_thousand(backend, dtype, log_scale, sign, in_state):
    """Exactly representable logits up to +-10,000, states scaled by e^+-80, against the formula in logarithms."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randint(-16, 17, (2, 2, n, 8), generator=generator).to(dtype) for n in (5, 6))
    q[..., 0], k[..., 0] = 80.0, sign * 100.0  # logits of +-8,000 and what the other seven entries add
    v = torch.randn(2, 2, 6, 8, generator=generator).to(dtype)
    Z, kk = torch.randn(2, 8, 8, generator=generator).to(dtype), torch.rand(2, 8, generator=generator).to(dtype) + 0.1
    b = torch.full((2,), log_scale, dtype=dtype)
    if in_state:
        Z, kk, b = Z * math.exp(log_scale), kk * math.exp(log_scale), torch.zeros_like(b)
    inputs = [q, k, v, Z, kk, b]
    assert (q @ k.mT).abs().max() > 8_000
    grad = torch.randn(2, 2, 5, 8, generator=generator)
    expected = outputs_and_gradients(
        lambda *x: in_logarithms(*x, log_elu_phi, scale=1.0), [x.double() for x in inputs], grad.double()
    )
    actual = outputs_and_gradients(operation(backend, scale=1.0), inputs, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    if backend != "eager" and dtype == torch.float32:
        tolerance = 5e-4  # half the rounding unit of a log-sum-exp of 10,000, from which the backward makes its weights
    # What cancels in the gradients to query and key has the size of the keys and queries, about 100; that to b is a sum
    # over Z * dZ, of both signs.
    for name, a, e in zip(("out", *NAMES), actual, expected, strict=True):
        floor = {"out": 0.0, "query": 10.0, "key": 10.0, "b": 1.0}.get(name, 0.1)
        assert relative_error(a, e, floor) < tolerance, name


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("kind", ["bool", "minus infinity", "smallest number"])
def test_rows_that_see_nothing_return_plain_attention(backend, kind):
    """Padding rows: the output of F.scaled_dot_product_attention, and no gradient through them."""
    q, k, v, Z, kk, b = make_case(0, H=2, H_kv=2, H_state=2, L=4, S=6, dtype=torch.float32)
    visible = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    visible[:, :, 1:3] = False
    hidden = -math.inf if kind == "minus infinity" else torch.finfo(torch.float32).min
    mask = visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, hidden)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    grad = torch.zeros(2, 2, 4, 8)
    grad[:, :, 1:3] = 1.0
    out, *gradients = outputs_and_gradients(operation(backend, attn_mask=mask), [q, k, v, Z, kk, b], grad)
    torch.testing.assert_close(out[:, :, 1:3], plain[:, :, 1:3])
    assert not torch.allclose(out[:, :, [0, 3]], plain[:, :, [0, 3]], atol=1e-3)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_of_another_dtype(backend, dtype, mask_dtype):
    """Each dtype has a smallest number of its own, which hides a key."""
    inputs = make_case(0, H=2, H_kv=2, H_state=2, L=4, S=6, dtype=dtype)
    visible = torch.ones(4, 6, dtype=torch.bool).tril(1)
    mask = torch.zeros(4, 6, dtype=mask_dtype).masked_fill(~visible, torch.finfo(mask_dtype).min)
    expected = operation("eager", attn_mask=visible)(*(x.double() for x in inputs))
    out = operation(backend, attn_mask=mask)(*inputs)
    assert relative_error(out, expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("sizes", [{"B": 0}, {"L": 0}, {"L": 1, "S": 1}, {"L": 1}, {"L": 9, "S": 2}], ids=str)
def test_empty_and_single(backend, sizes):
    inputs = make_case(0, **sizes, dtype=torch.float32)
    out, *gradients = outputs_and_gradients(operation(backend), inputs, torch.ones(()).expand(inputs[0].shape))
    assert out.shape == (*inputs[0].shape[:3], 8)
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("mask", [None, torch.ones(7, 0, dtype=torch.bool), torch.zeros(7, 0), torch.zeros(1)], ids=str)
def test_without_keys_it_is_plain_attention(backend, mask):
    """A row that sees no token: 0, as from F.scaled_dot_product_attention, and no gradient."""
    inputs = make_case(0, S=0, dtype=torch.float32)
    for result in outputs_and_gradients(operation(backend, attn_mask=mask), inputs, torch.ones(2, 4, 7, 8)):
        assert not result.any()


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
def test_without_weight_it_is_plain_attention(backend):
    q, k, v, Z, kk, b = make_case(0, dtype=torch.float64)
    out = operation(backend, is_causal=True)(q, k, v, Z, kk, b - 200)
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, plain)


def test_dropout_is_right_on_average():
    q, k, v, Z, kk, b = make_case(0, B=1, H=2, H_kv=2, H_state=2, dtype=torch.float64)
    run = operation("auto", dropout_p=0.3)
    torch.manual_seed(0)
    samples = torch.stack([run(q, k, v, Z, kk, b) for _ in range(4000)])
    assert (samples[0] != samples[1]).any()
    error = (samples.mean(0) - operation("eager")(q, k, v, Z, kk, b)).abs()
    assert (error < 6 * samples.std(0) / len(samples) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_the_lower_dtype(dtype):
    inputs = make_case(0, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        out = operation("sdpa")(*inputs)
    assert out.dtype == dtype
    lower = operation("sdpa")(*(x.to(dtype) for x in inputs[:3]), *inputs[3:])
    assert torch.equal(out, lower)


def test_autocast_leaves_float64_alone():
    inputs = make_case(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = operation("auto")(*inputs)
        with pytest.raises(ValueError, match=r"must share a dtype, got torch.float64, torch.float32, torch.float64"):
            operation("auto")(inputs[0], inputs[1].float(), *inputs[2:])
    assert torch.equal(out, operation("auto")(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("phi", ["elu", "taylor", "positive_random"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("kind", [None, "partial"])
def test_compiles_to_one_graph(backend, phi, kind):
    """torch.compile(fullgraph=True): outputs and gradients as without."""
    inputs = make_case(0, dtype=torch.float32, phi=phi)
    grad = torch.randn(2, 4, 7, 8)
    torch._dynamo.reset()
    rotation = make_rotation(kind, 7, 8, torch.float32)
    run = operation(backend, feature_map(phi).bind(8), is_causal=True, rotation=rotation)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(run, inputs, grad)
    for a, e in zip(outputs_and_gradients(compiled, inputs, grad), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_mask_with_a_gradient():
    """A trained position bias: fp64 gradient against finite differences, through whichever backend auto takes."""
    q, k, v, Z, kk, b = make_case(0, B=1, H=1, H_kv=1, H_state=1, L=3, S=4, d=2, d_v=2)
    bias = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: operation("auto", attn_mask=m)(q, k, v, Z, kk, b), bias)


def test_operators_are_registered_correctly():
    """torch.library.opcheck on both operators of the sdpa backend."""
    q, k, v = (x.float() for x in make_case(0)[:3])
    mask = torch.zeros(1, 1, 7, 9)
    forward = torch.ops.ntk_attention.context_forward
    torch.library.opcheck(forward, (q, k, v, mask, 0.0, False, 0.5), test_utils=OPCHECKS)
    out, lse, seed, offset = forward(q, k, v, mask, 0.0, False, 0.5)
    arguments = (torch.ones_like(out), out, lse, seed, offset, q, k, v, mask, 0.0, False, 0.5)
    torch.library.opcheck(torch.ops.ntk_attention.context_backward, arguments, test_utils=OPCHECKS)


# The gradient is registered on the whole, not on these two operators.
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def bad(**changes):
    def call():
        q, k, v, Z, kk, b = make_case(0, dtype=torch.float32)
        options = {"enable_gqa": True, **{n: x for n, x in changes.items() if n not in (*NAMES, "state")}}
        q, k, v = changes.get("query", q), changes.get("key", k), changes.get("value", v)
        return ntk_attention(q, k, v, changes.get("state", PrefixState(Z, kk, b)), **options)

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(query=torch.zeros(4, 7, 8)), r"query must be \[B, H, L, d\], got \[4, 7, 8\]"),
        (bad(key=torch.zeros(2, 2, 9, 6)), r"key must be \[2, H_kv, S, 8\].*got key \[2, 2, 9, 6\]"),
        (bad(value=torch.zeros(2, 2, 8, 8)), r"got key \[2, 2, 9, 8\] and value \[2, 2, 8, 8\]"),
        (bad(enable_gqa=False), "query has 4 heads and key 2"),
        (bad(query=torch.zeros(2, 3, 7, 8)), "query has 3 heads and key 2"),
        (bad(key=torch.zeros(2, 2, 9, 8).double()), "must share a dtype"),
        (bad(state=PrefixState(torch.zeros(3, 8, 8), torch.ones(3, 8))), "3 heads: expected 4 .* or 2"),
        (bad(state=PrefixState(torch.zeros(4, 9, 8), torch.ones(4, 9))), "r = 9 features, but 'elu' makes r = 8"),
        (bad(state=PrefixState(torch.zeros(4, 8, 6), torch.ones(4, 8))), "values of size 6, the attention has 8"),
        (bad(attn_mask=torch.zeros(7, 8)), r"attn_mask \[7, 8\] does not broadcast to .*\[2, 4, 7, 9\]"),
        (bad(attn_mask=torch.zeros(7, 9, dtype=torch.long)), "bool or floating point, got torch.int64"),
        (bad(attn_mask=torch.zeros(7, 9), is_causal=True), "exclude each other"),
        (bad(dropout_p=1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        (bad(scale=-1.0), "scale must be positive and finite, got -1.0"),
        (bad(scale=math.nan), "scale must be positive and finite, got nan"),
        (bad(dropout_p=math.nan), r"dropout_p must be in \[0, 1\), got nan"),
        (bad(query=torch.zeros(2, 4, 7, 8).long()), "query must be float64, .* or float16, got torch.int64"),
        (bad(value=torch.zeros(2, 2, 9, 8, dtype=torch.complex64)), "value must be float64, .*, got torch.complex64"),
        (
            bad(query=torch.zeros(2, 4, 7, 8).to(torch.float8_e4m3fn)),
            "query must be float64, .*, got torch.float8_e4m3fn",
        ),
        (bad(query=torch.zeros(())), r"query must be \[B, H, L, d\], got \[\]"),
        (bad(query=torch.zeros(2, 0, 7, 8)), r"at least one head .*, got query \[2, 0, 7, 8\]"),
        (bad(key=torch.zeros(2, 0, 9, 8), value=torch.zeros(2, 0, 9, 8)), r"got value \[2, 0, 9, 8\]"),
        (bad(query=torch.zeros(2, 4, 7, 0), key=torch.zeros(2, 2, 9, 0)), r"got query \[2, 4, 7, 0\]"),
        (bad(value=torch.zeros(2, 2, 9, 0)), r"a size of at least one, got value \[2, 2, 9, 0\]"),
        (bad(key=torch.zeros(2, 2, 9, 8, device="meta")), "on one device, got query on cpu and key on meta"),
        (bad(attn_mask=torch.zeros(7, 9, device="meta")), "got query on cpu and attn_mask on meta"),
        (bad(state=PrefixState(torch.zeros(4, 8, 8, device="meta"), torch.ones(4, 8, device="meta"))), "state on meta"),
        (bad(backend="flash"), "unknown backend 'flash'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
