"""Custom operators and torch.compile on inputs of any strides."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ntk_attention import PrefixState, feature_map, ntk_attention
from ntk_attention.ops import fused, sdpa
from ntk_attention.ops.bundles import Tokens
from tests.reference import relative_error

from .paths import flat, has_kernels, paths
from .rotations import make_rotation
from .test_strides import (
    DEVICE,
    LAYOUTS,
    SMALL,
    laid_out,
    make_inputs,
    make_mask,
    outputs_and_gradients,
)

pytestmark = pytest.mark.slow


def operators(inputs, grad_out, kind):
    """Every custom operator with its arguments."""
    tokens = Tokens(*inputs[:3], scale=0.25)
    yield sdpa.context_forward, tokens
    out, lse, seed, offset = sdpa.context_forward(*tokens)
    yield sdpa.context_backward, (grad_out, out, lse, seed, offset, *tokens)
    L, d = inputs[0].shape[2:]
    rotation = make_rotation(kind, L, d, inputs[0].dtype, device=DEVICE)
    arguments = flat(inputs, rotation=rotation, is_causal=False, constant=False, scale=0.25)
    for path in paths(inputs[0], inputs[2]):
        yield fused.forward_op, (*arguments, path)
        for needed in (True, False):
            yield fused.backward_op, (grad_out, out, lse, *arguments, path, needed)
    if has_kernels(inputs[0], inputs[2]):
        yield fused.decode_op, arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [None, "halves", "partial"])
def test_operators_promise_the_strides_that_they_return(layout, dtype, kind):
    inputs, grad_out = make_inputs(dtype, **SMALL)
    tensors = [laid_out(x, LAYOUTS[layout]) for x in (*inputs, grad_out)]
    for operator, arguments in operators(tensors[:6], tensors[6], kind):
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            promised = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
        real, promised = ((x,) if isinstance(x, torch.Tensor) else x for x in (real, promised))
        for a, p in zip(real, promised, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (p.shape, p.stride(), p.dtype), operator


@pytest.mark.parametrize("layout", ["transposed", "one for all, sliced"])
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("kind", [None, "halves"])
def test_compiled(backend, layout, kind):
    inputs, grad_out = make_inputs(torch.float32)
    tensors = [laid_out(x, LAYOUTS[layout]) for x in (*inputs, grad_out)]
    mask = laid_out(make_mask((2, 4, 7, 9), torch.bool), LAYOUTS[layout])
    torch._dynamo.reset()
    rotation = make_rotation(kind, 7, 8, torch.float32, device=DEVICE)

    @torch.compile(fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    def run(query, key, value, Z, k, b, mask):
        state = PrefixState.trusted(Z, k, b, feature_map("elu"))
        options = {"attn_mask": mask, "rotation": rotation, "enable_gqa": True}
        return ntk_attention(query, key, value, state, backend=backend, **options)

    leaves = [x.detach().requires_grad_() for x in tensors[:6]]
    actual = [out := run(*leaves, mask), *torch.autograd.grad(out, leaves, tensors[6])]
    contiguous = [x.contiguous() for x in tensors]
    options = {"attn_mask": mask.contiguous(), "rotation": rotation}
    expected = outputs_and_gradients(contiguous[:6], contiguous[6], "eager", **options)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e, 1.0) < 1e-5
