"""What the kernels `merge_prefix` and `prefix_backward` do, in torch's own operations: for CPUs and float32.

Few passes over memory and few allocations, which are what takes time on a CPU. phi(x) = elu(x) + 1.
"""

import torch
from torch import Tensor

from .bundles import StateTensors
from .rotation import Rotation


def merge_prefix(query: Tensor, context: Tensor, lse: Tensor, state: StateTensors) -> tuple[Tensor, Tensor]:
    """Merge the prefix into plain attention.

    Args:
        query: [B, H, L, d].
        context: output of plain attention [B, H, L, d_v].
        lse: of its logits [B, H, L], in float32 or float64; the dtype of the arithmetic.

    Returns:
        The output in the dtype of context, and the lse of all weights.
    """
    Z, k, log_scale, constant, factor = state.Z, state.k, state.log_scale, state.constant, state.factor
    H, d = query.shape[1], query.shape[-1]
    Zk = torch.cat([Z, k[..., None]], dim=-1).to(lse.dtype)
    phi_Zk = _by_state(_features(query, factor, lse.dtype, state.rotation), len(Z)) @ Zk[:, :d]
    if constant:
        phi_Zk += Zk[:, d:]
    phi_Zk = phi_Zk.view(*lse.shape, -1)
    phi_Z, phi_k = phi_Zk[..., :-1], phi_Zk[..., -1]
    b = log_scale.to(lse.dtype).repeat_interleave(H // len(Z))[:, None]
    lse_all = torch.logaddexp(lse, torch.log(phi_k) + b)
    w = torch.exp(b - lse_all).masked_fill_(phi_k < torch.finfo(lse.dtype).tiny, 0.0)
    out = (context.to(lse.dtype) * torch.exp(lse - lse_all)[..., None]).addcmul_(phi_Z, w[..., None])
    return out.to(context.dtype), lse_all


def prefix_backward(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, grad_query: Tensor | None, state: StateTensors
) -> tuple[Tensor, Tensor]:
    """Gradients to Z and k; what the prefix adds to that of the query is added to `grad_query`, unless that is None.

    With w = exp(b - lse) and delta = rowsum(dout * out): dphi = w (dout Z^T - delta k), dZ = phi^T (w dout),
    dk = -phi^T (w delta).

    Args:
        grad_out, out: [B, H, L, d_v], of the merged output.
        lse: of all weights [B, H, L]; +inf in rows that have no gradient.
    """
    Z, k, log_scale, constant, factor = state.Z, state.k, state.log_scale, state.constant, state.factor
    rotation = state.rotation
    H, d = query.shape[1], query.shape[-1]
    H_state = len(Z)
    phi = _features(query, factor, lse.dtype, rotation)
    w = torch.exp(log_scale.to(lse.dtype).repeat_interleave(H // H_state)[:, None] - lse)
    grad_out, out = grad_out.to(lse.dtype), out.to(lse.dtype)
    w_delta = w * (grad_out * out).sum(dim=-1)
    w_grad = _by_state(grad_out * w[..., None], H_state)
    by_state = _by_state(phi, H_state)
    grad_Z = (by_state.transpose(-1, -2) @ w_grad).sum(dim=0)
    grad_k = -(by_state.transpose(-1, -2) @ _by_state(w_delta[..., None], H_state)).sum(dim=0).squeeze(-1)
    if constant:
        grad_Z = torch.cat([grad_Z, w_grad.sum(dim=(0, 2))[:, None]], dim=1)
        grad_k = torch.cat([grad_k, -_by_state(w_delta[..., None], H_state).sum(dim=(0, 2))], dim=1)
    if grad_query is not None:
        Z, k = (x[:, :d].to(lse.dtype) for x in (Z, k))
        grad_phi = (w_grad @ Z.transpose(-1, -2)).view_as(phi)
        grad_phi.addcmul_(w_delta[..., None], k.repeat_interleave(H // H_state, dim=0)[:, None], value=-1)
        grad_x = grad_phi.mul_(phi.clamp_(max=1.0))  # phi' = min(phi, 1)
        if rotation is None:
            grad_query.add_(grad_x, alpha=factor)
        else:
            grad_query.add_(_turned(grad_x, factor, rotation, forward=True))
    return grad_Z, grad_k


def _features(query: Tensor, factor: float, dtype: torch.dtype, rotation: Rotation | None) -> Tensor:
    """exp(x) below 0, 1 + x above: [B, H, L, d]."""
    query = query.to(dtype, memory_format=torch.contiguous_format)
    x = query * factor if rotation is None else _turned(query, factor, rotation, forward=False)
    return x.clamp(max=0.0).exp_().add_(x.clamp_(min=0.0))


def _turned(x: Tensor, factor: float, rotation: Rotation, forward: bool) -> Tensor:
    """factor times `rotation.turned`, of an x [B, H, L, d] in one piece of memory."""
    table, width, start = rotation
    cos, sin = (factor * table.to(x.dtype))[:, None].unflatten(-1, (2, -1, width // 2)).unbind(-3)
    behind = x.shape[-1] - start - table.shape[-1]
    both = torch.nn.functional.pad(torch.stack([cos, cos], dim=-2).flatten(-3), (start, behind), value=factor)
    out = x * both
    inside = slice(start, start + table.shape[-1])
    (to_first, to_second), (first, second) = (
        y[..., inside].unflatten(-1, (-1, 2, width // 2)).unbind(-2) for y in (out, x)
    )
    to_first.addcmul_(second, sin, value=-1 if forward else 1)
    to_second.addcmul_(first, sin, value=1 if forward else -1)
    return out


def _by_state(x: Tensor, num_states: int) -> Tensor:
    """[B, H, L, n] -> [B, H_state, G L, n]: the query heads of one state head share its matrices."""
    B, H, L, n = x.shape
    return x.reshape(B, num_states, H // num_states * L, n)
