"""The sdpa backend on a GPU: every kernel that torch has, outputs and all gradients against fp64."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntk_attention.ops.attention import ntk_attention
from ntk_attention.ops.state import PrefixState
from tests.reference import relative_error

from .rotations import in_double, make_rotation

pytestmark = pytest.mark.gpu
# The bound for bf16: rounding of the inputs is shared with the reference, that of the output and of P is not.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
KERNELS = [
    None,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]
CASES = [  # B, H, H_kv, L, S, d, d_v, causal, mask
    (2, 4, 4, 64, 64, 64, 64, True, None),
    (1, 8, 2, 63, 63, 128, 128, True, None),
    (2, 4, 2, 1, 77, 64, 64, False, None),
    (2, 4, 4, 60, 100, 80, 80, False, "bool"),
    (2, 6, 2, 33, 65, 96, 64, False, "additive"),
    (1, 2, 1, 40, 40, 36, 20, False, "padding"),
    (1, 2, 2, 130, 130, 256, 256, True, None),
    (3, 9, 3, 1, 47, 64, 64, False, "left"),  # decoding of a left-padded batch
    (3, 9, 3, 46, 46, 64, 64, False, "left"),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", [None, "halves", "partial"])
def test_against_fp64(case, kernel, dtype, kind):
    B, H, H_kv, L, S, d, d_v, is_causal, mask_kind = case
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, h, n, m) for h, n, m in ((H, L, d), (H_kv, S, d), (H_kv, S, d_v)))
    q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
    Z, kk, b = torch.randn(H, d, d_v).cuda(), torch.rand(H, d).cuda() * 0.1 + 0.01, torch.randn(H).cuda()
    mask = {
        None: None,
        "bool": torch.rand(B, 1, L, S, device="cuda") > 0.3,
        "additive": torch.randn(1, H, L, S, device="cuda", dtype=dtype),
        "padding": (torch.arange(S, device="cuda") >= 5)[None, None, None]
        & torch.ones(L, S, dtype=torch.bool, device="cuda").tril(),
        "left": (torch.arange(S, device="cuda") >= torch.arange(B, device="cuda")[:, None, None, None])
        & torch.ones(L, S, dtype=torch.bool, device="cuda").tril(S - L),
    }[mask_kind]
    grad = torch.randn(B, H, L, d_v, device="cuda", dtype=dtype)
    rotation = make_rotation(kind, L, d, dtype, B, device="cuda")

    def run(backend, dtype, state_dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)] + [
            x.to(state_dtype).requires_grad_() for x in (Z, kk, b)
        ]
        state = PrefixState(*inputs[3:])
        m = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        options = {"attn_mask": m, "is_causal": is_causal, "enable_gqa": True, "backend": backend}
        own = in_double(rotation) if dtype == torch.float64 else rotation
        out = ntk_attention(*inputs[:3], state, rotation=own, **options)
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    expected = run("eager", torch.float64, torch.float64)
    try:
        if kernel is None:
            actual = run("sdpa", dtype, torch.float32)
        else:
            with sdpa_kernel(kernel):
                actual = run("sdpa", dtype, torch.float32)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            pytest.skip("torch has no such kernel for this case")
        raise
    errors = [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    assert max(errors) < TOLERANCE[dtype], dict(zip(["out", "q", "k", "v", "Z", "k", "b"], errors, strict=True))
