"""The Triton kernels: outputs and all gradients against the fp64 reference, on a GPU or interpreted on a CPU."""

import pytest
import torch
from peft import get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from ntk_attention import NTKAttentionConfig, PrefixState, Rotation, feature_map, ntk_attention
from ntk_attention.ops import fused
from ntk_attention.ops.plan import Path
from ntk_attention.ops.triton import support

from .paths import flat, has_kernels, merge_always, path_of, paths, without_hopper
from .rotations import KINDS, make_rotation

pytestmark = pytest.mark.skipif(support.triton is None, reason="needs Triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# |actual - expected| / |expected|: rounding of the output and of P, Z and phi. The interpreter cuts bf16 off instead.
TOLERANCE = {torch.bfloat16: 8e-3 if ON_GPU else 1.6e-2, torch.float16: 2e-3}
FULL = {torch.float32: 1e-5, torch.float64: 1e-12}  # in torch's operations
NAMES = ("out", "query", "key", "value", "Z", "k", "log_scale")
CASES = {  # B, H, H_kv, H_state, L, S, d, d_v, causal, mask, constant feature[, kind of rotation, rows of its table]
    "causal": (2, 4, 4, 4, 70, 70, 64, 64, True, None, True),
    "no constant": (1, 2, 2, 2, 63, 63, 32, 32, True, None, False),
    "full, grouped": (1, 4, 2, 4, 33, 130, 64, 64, False, None, True),
    "state per KV head": (2, 4, 2, 2, 65, 65, 64, 64, True, None, True),
    "more queries than keys": (1, 2, 1, 1, 100, 40, 64, 64, True, None, True),
    "bool mask, d 80 and 96": (1, 4, 2, 2, 33, 65, 80, 96, False, "random", True),
    "left padding": (3, 3, 1, 3, 46, 46, 64, 64, False, "left", True),
    "sliding window": (1, 2, 2, 2, 90, 90, 32, 32, False, "window", False),
    "d 96": (1, 2, 2, 2, 40, 40, 96, 96, True, None, True),
    "d 128": (1, 2, 1, 2, 130, 130, 128, 128, True, None, True),
    "d 256": (1, 2, 1, 2, 40, 40, 256, 256, True, None, True),
    "three tokens": (2, 4, 4, 4, 3, 3, 64, 64, True, None, True),
    "halves": (2, 4, 2, 4, 70, 70, 64, 64, True, None, True, "halves", 1),
    "halves, a table for each row": (2, 2, 1, 1, 65, 65, 32, 32, True, None, False, "halves", 2),
    "halves, d 48 and 32": (1, 2, 1, 2, 33, 45, 48, 32, False, "random", True, "halves", 1),
    "halves, d 96": (1, 2, 2, 2, 40, 40, 96, 96, True, None, True, "halves", 1),
    "halves, d 128": (1, 2, 1, 2, 67, 67, 128, 128, True, None, True, "halves", 1),
    "halves, d 256": (1, 2, 1, 2, 40, 40, 256, 256, True, None, True, "halves", 1),
    "neighbours": (2, 2, 1, 2, 63, 63, 64, 64, True, None, True, "neighbours", 2),
    "partial, left padding": (3, 3, 1, 3, 46, 46, 64, 64, False, "left", True, "partial", 3),
    "partial, d 96": (1, 2, 2, 2, 33, 33, 96, 96, True, None, True, "partial", 1),
    "runs, d 48": (1, 2, 1, 2, 40, 40, 48, 48, True, None, False, "runs", 1),
}
DECODING = {  # the same; without gradients
    "one program per head": (2, 4, 2, 4, 1, 40, 64, 64, False, None, True),
    "split": (1, 4, 2, 4, 1, 1000, 64, 64, False, None, True),
    "split, a short query": (1, 4, 2, 2, 5, 700, 32, 64, False, "random", False),
    "left padding": (3, 9, 3, 9, 1, 300, 64, 64, False, "left", True),
    "d 80": (1, 4, 1, 4, 1, 300, 80, 80, False, "random", True),
    "d 128": (2, 8, 2, 8, 1, 500, 128, 128, False, "left", True),
    "d 256": (1, 2, 1, 1, 1, 300, 256, 256, False, None, True),
    "causal, the first key alone": (1, 2, 2, 2, 1, 40, 64, 64, True, None, True),
    "halves": (2, 4, 2, 4, 1, 40, 64, 64, False, None, True, "halves", 2),
    "halves, split, a short query": (1, 4, 2, 2, 5, 700, 48, 64, False, "random", False, "halves", 1),
    "halves, d 256": (1, 2, 1, 1, 1, 300, 256, 256, False, None, True, "halves", 1),
    "neighbours, d 96": (2, 4, 2, 2, 2, 40, 96, 96, False, None, True, "neighbours", 2),
    "partial, left padding": (3, 3, 1, 3, 1, 300, 64, 64, False, "left", True, "partial", 3),
    "partial, d 80": (1, 4, 1, 4, 3, 40, 80, 80, False, None, True, "partial", 1),
    "runs": (2, 4, 2, 4, 2, 40, 64, 64, False, None, False, "runs", 1),
}


LONG = {  # the same, for a GPU alone
    "causal": (2, 4, 2, 4, 700, 700, 128, 128, True, None, True),
    "full, no constant": (1, 2, 2, 2, 640, 515, 128, 128, False, None, False),
    "more queries than keys": (1, 2, 1, 1, 600, 40, 128, 128, True, None, True),
    "halves": (2, 4, 2, 2, 700, 700, 128, 128, True, None, True, "halves", 1),
    "halves, a table for each row": (3, 2, 1, 2, 577, 577, 128, 128, True, None, False, "halves", 3),
    "d 64": (2, 4, 2, 2, 700, 700, 64, 64, True, None, True, "halves", 2),
    "neighbours": (2, 2, 1, 2, 600, 600, 128, 128, True, None, True, "neighbours", 2),
}
PLAIN = (1, 2, 1, 2, 20, 20, 32, 32, True, None, True)
SMALL = {"plain": PLAIN, **{kind: (*PLAIN, kind, 1) for kind in KINDS}}
RANDOM = {  # the same for positive random features
    "causal": (2, 4, 2, 4, 70, 70, 64, 64, True, None, False),
    "state per KV head": (2, 4, 2, 2, 65, 65, 64, 64, True, None, True),
    "bool mask, d 80 and 96": (1, 4, 2, 2, 33, 65, 80, 96, False, "random", True),
    "left padding": (3, 3, 1, 3, 46, 46, 64, 64, False, "left", False),
    "d 128": (1, 2, 1, 2, 130, 130, 128, 128, True, None, True),
    "halves": (2, 4, 2, 4, 40, 40, 64, 64, True, None, False, "halves", 2),
    "halves, d 48": (1, 2, 1, 2, 33, 45, 48, 48, False, "random", True, "halves", 1),
}
RANDOM_DECODING = {
    "one program per head": (2, 4, 2, 4, 1, 40, 64, 64, False, None, True),
    "split, a short query": (1, 4, 2, 2, 5, 700, 32, 64, False, "random", False),
    "left padding": (3, 9, 3, 9, 1, 300, 80, 80, False, "left", True),
    "halves": (2, 4, 2, 4, 2, 40, 64, 64, False, None, True, "halves", 2),
    "neighbours, d 48": (1, 2, 1, 2, 1, 40, 48, 48, False, None, False, "neighbours", 1),
    "partial": (2, 2, 1, 2, 1, 150, 64, 64, False, None, True, "partial", 2),
    "runs": (1, 2, 1, 2, 3, 40, 64, 64, False, None, True, "runs", 1),
}


def make_mask(kind, B, L, S):
    keys, rows = torch.arange(S, device=DEVICE), torch.arange(L, device=DEVICE)[:, None] + S - L
    if kind is None:
        return None
    if kind == "random":
        mask = torch.rand(B, 1, L, S, device=DEVICE) > 0.3
        mask[:, :, L // 2] = L == 1  # a row that sees nothing
        return mask
    if kind == "left":
        return (keys <= rows) & (keys >= 5 * torch.arange(B, device=DEVICE)[:, None, None, None])
    return ((keys <= rows) & (keys > rows - 16))[None, None]


def make_inputs(case, dtype, random_features=None):
    B, H, H_kv, H_state, L, S, d, d_v, is_causal, mask, constant, *rotation = case
    torch.manual_seed(0)
    if random_features is None:
        phi = feature_map("elu", constant=constant)
    else:
        phi = feature_map("positive_random", num_features=random_features, constant=constant).bind(d).to(DEVICE)
    r = phi.num_features(d)
    inputs = [torch.randn(B, h, n, m).to(DEVICE, dtype) for h, n, m in ((H, L, d), (H_kv, S, d), (H_kv, S, d_v))]
    state = [torch.randn(H_state, r, d_v), torch.rand(H_state, r) * 0.1 + 0.01, torch.randn(H_state)]
    options = {"attn_mask": make_mask(mask, B, L, S), "is_causal": is_causal, "enable_gqa": True}
    if rotation:
        kind, batch = rotation
        options["rotation"] = make_rotation(kind, L, d, dtype, batch, device=DEVICE)
    return inputs + [x.to(DEVICE) for x in state], phi, options


def run(inputs, phi, options, backend, dtype, grad=True):
    """Output and gradients, the state in float32 next to half precision."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [x.to(dtype if i < 3 else state_dtype).requires_grad_(grad) for i, x in enumerate(inputs)]
    out = ntk_attention(*leaves[:3], PrefixState(*leaves[3:], phi), backend=backend, **options)
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape, device=DEVICE, dtype=torch.float64).to(dtype)
    return [out.detach(), *(torch.autograd.grad(out, leaves, grad_out) if grad else ())]


def skip_uncovered(name, dtype):
    if "256" in name and dtype == torch.float16:
        pytest.skip("no kernel for d = 256 in fp16")


def check(actual, expected, dtype, Z=None):
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        size = e.norm().item()
        if name == "k":  # delta = rowsum(dout * out), of both signs, has the rounding of every element of out
            size *= 2
        if name == "log_scale":  # a sum over Z * dZ, of both signs
            size = max(size, (Z * expected[4]).norm().item())
        error = (a.double() - e).norm().item() / size
        assert error < (TOLERANCE | FULL)[dtype], (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fused(name, dtype):
    skip_uncovered(name, dtype)
    arguments = make_inputs(CASES[name], dtype)
    check(run(*arguments, "triton", dtype), run(*arguments, "eager", torch.float64), dtype, arguments[0][3])


@pytest.mark.gpu
@pytest.mark.skipif(support.forward_sm90 is None, reason="there is no other kernel")
@pytest.mark.parametrize("name", ["causal", "full, grouped", "state per KV head", "d 128", "halves", "halves, d 128"])
def test_fused_on_a_gpu_that_is_not_a_hopper(name, monkeypatch):
    without_hopper(monkeypatch)
    test_fused(name, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LONG)
def test_long_queries(name):
    """Whose programs stay, on a Hopper."""
    arguments = make_inputs(LONG[name], torch.bfloat16)
    expected = run(*arguments, "eager", torch.float64)
    check(run(*arguments, "triton", torch.bfloat16), expected, torch.bfloat16, arguments[0][3])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "causal",
        "full, grouped",
        "state per KV head",
        "d 96",
        "d 128",
        "no constant",
        "halves, a table for each row",
        "halves, d 96",
        "neighbours",
        "runs, d 48",
    ],
)
def test_merged_into_the_library_kernel(name, dtype, monkeypatch):
    merge_always(monkeypatch)
    inputs, phi, options = make_inputs(CASES[name], dtype)
    leaves = [x.clone().requires_grad_() for x in inputs]
    state = PrefixState(*leaves[3:], phi)
    rotation = options.get("rotation")
    assert path_of(*leaves[:3], state, is_causal=options["is_causal"], rotation=rotation) is Path.MERGED
    out = ntk_attention(*leaves[:3], state, **options)
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape, device=DEVICE, dtype=torch.float64).to(dtype)
    actual = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    check(actual, run(inputs, phi, options, "eager", torch.float64), dtype, inputs[3])


@pytest.mark.parametrize("dtype", list(FULL), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_in_torch_operations(name, dtype):
    inputs, phi, options = make_inputs(CASES[name], dtype)
    state, rotation = PrefixState(*inputs[3:], phi), options.get("rotation")
    assert path_of(*inputs[:3], state, options["attn_mask"], rotation=rotation) is Path.MERGED_TORCH
    actual = run(inputs, phi, options, "auto", dtype)
    check(actual, run(inputs, phi, options, "eager", torch.float64), dtype, inputs[3])
    without_gradients = run(inputs, phi, options, "auto", dtype, grad=False)
    assert torch.equal(without_gradients[0], actual[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", DECODING)
def test_decoding(name, dtype):
    skip_uncovered(name, dtype)
    arguments = make_inputs(DECODING[name], dtype)
    actual = run(*arguments, "triton", dtype, grad=False)
    check(actual, run(*arguments, "eager", torch.float64, grad=False), dtype)
    again = run(*arguments, "triton", dtype, grad=False)  # finds the counters as they were
    assert torch.equal(actual[0], again[0])


@pytest.mark.slow
@pytest.mark.parametrize("r", [40, 130])
@pytest.mark.parametrize("name", RANDOM)
def test_positive_random_features(name, r):
    inputs, phi, options = make_inputs(RANDOM[name], torch.bfloat16, r)
    state = PrefixState(*inputs[3:], phi)
    assert path_of(*inputs[:3], state, options["attn_mask"], rotation=options.get("rotation")) is Path.FUSED
    actual = run(inputs, phi, options, "auto", torch.bfloat16)
    check(actual, run(inputs, phi, options, "eager", torch.float64), torch.bfloat16, inputs[3])


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM_DECODING)
def test_decoding_with_positive_random_features(name):
    inputs, phi, options = make_inputs(RANDOM_DECODING[name], torch.bfloat16, 100)
    out = run(inputs, phi, options, "triton", torch.bfloat16, grad=False)
    check(out, run(inputs, phi, options, "eager", torch.float64, grad=False), torch.bfloat16)


@pytest.mark.slow
def test_decoding_is_the_same_with_gradients():
    arguments = make_inputs(DECODING["split"], torch.bfloat16)
    actual, expected = run(*arguments, "triton", torch.bfloat16), run(*arguments, "eager", torch.float64)
    check(actual, expected, torch.bfloat16, arguments[0][3])


@pytest.mark.parametrize("name", ["causal", "left padding", "full, grouped"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_prefix_without_weight_is_not_there(name, backend, monkeypatch):
    merge_always(monkeypatch)
    inputs, phi, options = make_inputs(CASES[name], torch.bfloat16)
    inputs[4] = torch.zeros_like(inputs[4])
    state = PrefixState.trusted(*inputs[3:], phi)
    for rows in (slice(None), slice(-1, None)):  # the last one decodes
        if rows.start == -1 and options["is_causal"]:
            continue
        mask = None if options["attn_mask"] is None else options["attn_mask"][..., rows, :]
        query = inputs[0][:, :, rows]
        out = ntk_attention(query, *inputs[1:3], state, backend=backend, **{**options, "attn_mask": mask})
        reference = ntk_attention(
            *(x.double() for x in (query, *inputs[1:3])), state, backend="eager", **{**options, "attn_mask": mask}
        )
        assert (out - reference).norm() < TOLERANCE[torch.bfloat16] * reference.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "halves", "neighbours"])
@pytest.mark.parametrize("layout", ["heads outside", "sliced", "one row for all"])
def test_any_layout(layout, name):
    inputs, phi, options = make_inputs(CASES[name], torch.bfloat16)
    expected = run(inputs, phi, options, "triton", torch.bfloat16)
    if layout == "heads outside":  # as transformers has it: [B, L, H, d] seen as [B, H, L, d]
        inputs[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    elif layout == "sliced":
        inputs[:3] = [torch.cat([x, x], dim=-1)[..., : x.shape[-1]] for x in inputs[:3]]
    else:
        inputs[0] = inputs[0][:, :, :1].expand_as(inputs[0])
        expected = run([inputs[0].contiguous(), *inputs[1:]], phi, options, "triton", torch.bfloat16)
    actual = run(inputs, phi, options, "triton", torch.bfloat16)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "halves", "neighbours"])
def test_gradients_are_deterministic(name):
    arguments = make_inputs(CASES[name], torch.bfloat16)
    first, second = (run(*arguments, "triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_only_the_state_trains():
    inputs, phi, options = make_inputs(CASES["causal"], torch.bfloat16)
    expected = run(inputs, phi, options, "triton", torch.bfloat16)
    Z, k, b = (x.clone().requires_grad_() for x in inputs[3:])
    out = ntk_attention(*inputs[:3], PrefixState(Z, k, b, phi), backend="triton", **options)
    torch.manual_seed(1)
    grad_out = torch.randn(out.shape, device=DEVICE, dtype=torch.float64).to(torch.bfloat16)
    for actual, e in zip(torch.autograd.grad(out, (Z, k, b), grad_out), expected[4:], strict=True):
        assert torch.equal(actual, e)


@pytest.mark.parametrize(
    "change",
    ["dtype", "map", "many features", "head_dim", "mask", "empty", "rotation", "odd halves"],
)
def test_what_no_kernel_covers_goes_to_the_sdpa_backend(change):
    dtype = torch.float32 if change == "dtype" else torch.bfloat16
    d = {"head_dim": 12, "odd halves": 24}.get(change, 32)
    S = 0 if change == "empty" else 20
    torch.manual_seed(0)
    L = 70 if change in ("rotation", "odd halves") else 20  # decoding knows these
    q, k, v = (torch.randn(1, 2, n, d, device=DEVICE, dtype=dtype) for n in (L, S, S))
    maps = {"map": feature_map("taylor"), "many features": feature_map("positive_random", num_features=600)}
    maps["rotation"] = feature_map("positive_random", num_features=40)
    phi = maps.get(change, feature_map("elu")).bind(d).to(DEVICE)
    r = phi.num_features(d)
    state = PrefixState(torch.randn(2, r, d, device=DEVICE), torch.rand(2, r, device=DEVICE) + 0.1, feature_map=phi)
    mask = torch.randn(20, 20, device=DEVICE, dtype=dtype) if change == "mask" else None
    rotation = make_rotation("neighbours", L, d, dtype, device=DEVICE) if change == "rotation" else None
    assert path_of(q, k, v, state, mask, rotation=rotation, backend="triton") is Path.SDPA
    options = {"attn_mask": mask, "rotation": rotation}
    out, expected = (ntk_attention(q, k, v, state, backend=b, **options) for b in ("triton", "sdpa"))
    assert torch.equal(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_operators(dtype, kind):
    inputs, _, options = make_inputs(SMALL[kind], dtype)
    rotation = options.get("rotation")
    leaves = [x.requires_grad_() for x in inputs]
    plain = [x.detach() for x in inputs]
    for path in paths(inputs[0], inputs[2]):
        torch.library.opcheck(fused.forward_op, (*flat(leaves, rotation=rotation), path))
        out, lse = fused.forward_op(*flat(plain, rotation=rotation), path)
        arguments = *flat(plain, rotation=rotation), path, True
        torch.library.opcheck(fused.backward_op, (torch.ones_like(out), out, lse, *arguments))
    if has_kernels(inputs[0], inputs[2]):
        last = None if rotation is None else rotation.rows(19, 1)
        arguments = flat([plain[0][:, :, -1:], *plain[1:]], rotation=last, is_causal=False)
        torch.library.opcheck(fused.decode_op, arguments)
    if has_kernels(inputs[0], inputs[2]) and kind != "neighbours":
        inputs, phi, _ = make_inputs(SMALL[kind], dtype, 40)
        arguments = *flat(inputs, W=phi.projection.detach(), rotation=rotation), Path.FUSED.value
        torch.library.opcheck(fused.forward_op, arguments)
        out, lse = fused.forward_op(*arguments)
        torch.library.opcheck(fused.backward_op, (torch.ones_like(out), out, lse, *arguments, True))


@pytest.mark.slow
@pytest.mark.parametrize("random_features", [None, 40])
@pytest.mark.parametrize("name", ["causal", "left padding", *SMALL])
def test_compiles_to_one_graph(name, random_features):
    """With a rotation that is made in the graph, as a model makes one."""
    inputs, phi, options = make_inputs((CASES | SMALL)[name], torch.bfloat16, random_features)
    rotation = options.pop("rotation", None)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    def compiled(query, key, value, Z, k, b, *angles):
        state = PrefixState.trusted(Z, k, b, phi)
        return ntk_attention(query, key, value, state, backend="triton", rotation=made(*angles), **options)

    def made(*angles):
        return Rotation.of(*angles, width=rotation.width, start=rotation.start) if angles else None

    angles = () if rotation is None else [x.contiguous() for x in rotation.table.chunk(2, dim=-1)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(compiled(*leaves, *angles).float().square().sum(), leaves)
    eager = [x.clone().requires_grad_() for x in inputs]
    state = PrefixState(*eager[3:], phi)
    out = ntk_attention(*eager[:3], state, backend="triton", rotation=made(*angles), **options)
    for a, e in zip(grads, torch.autograd.grad(out.float().square().sum(), eager), strict=True):
        assert torch.allclose(a, e, rtol=2e-2, atol=2e-2 * e.abs().max().item())
    tolerance = 0.0 if rotation is None else 2e-2  # a table made in the graph rounds some numbers otherwise
    with torch.no_grad():
        again = compiled(*inputs, *angles)
    assert torch.allclose(again, out, rtol=tolerance, atol=tolerance * out.abs().max().item())


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["left padding", "halves", "partial, left padding"])
def test_decoding_in_a_cuda_graph(name):
    inputs, phi, options = make_inputs(DECODING[name], torch.bfloat16)
    state = PrefixState(*inputs[3:], phi)

    def step():
        return ntk_attention(*inputs[:3], state, **options)

    with torch.no_grad():
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [step() for _ in range(3)]
        inputs[0].normal_()
        expected = step()
        for _ in range(2):
            graph.replay()
        assert all(torch.equal(out, expected) for out in outputs)


@pytest.mark.gpu
def test_left_padded_batches_generate_what_their_rows_do():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=576, intermediate_size=512, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, initializer_range=0.05, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    model = get_peft_model(model, NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    rows = [torch.randint(2, 500, (n,), device="cuda") for n in (3, 17, 40)]
    ids = torch.stack([torch.nn.functional.pad(row, (40 - len(row), 0)) for row in rows])
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    together = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), **options)
    for i, row in enumerate(rows):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **options)
        for step in range(4):
            a, e = together.logits[step][i].float(), alone.logits[step][0].float()
            assert (a - e).norm() < 0.03 * e.norm(), (i, step)
            if a.argmax() != e.argmax():  # two near equals: from here on the texts differ
                break


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "halves", "neighbours"])
@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=str)
def test_each_library_kernel_serves_the_backward_pass(kernel, name):
    arguments = make_inputs(CASES[name], torch.bfloat16)
    with sdpa_kernel(kernel):
        actual = run(*arguments, "auto", torch.bfloat16)
    check(actual, run(*arguments, "eager", torch.float64), torch.bfloat16, arguments[0][3])
