"""How far a state of Theorem 4.1's features can be from the prefix it was made of, before anything is measured.

Derived in docs/conversion.md. With logits |z| <= R the Taylor polynomial P_g of even degree g has

    P_g(z) e^-z = 1 - int_0^z t^g e^-t / g! dt,

which falls in z: the weight of every token is off by a factor between a = P_g(R) e^-R <= 1 and b = P_g(-R) e^R >= 1,
and no reweighting by such factors moves a mean further than tanh(log(b / a) / 4) of the range of what is averaged.
"""

from __future__ import annotations

import math

MAX_DEGREE = 64


def taylor_error_bound(
    entry_bound: float,
    degree: int,
    head_dim: int,
    *,
    value_bound: float | None = None,
    scale: float | None = None,
) -> float:
    """A bound on |T - PrefixAttn| in every entry, for any prefix, any m, any real tokens and any L.

    It holds for exact arithmetic and `PrefixState.from_prefix(..., feature_map("taylor", degree=degree))`.

    Args:
        entry_bound: of every entry of the queries and of the prefix keys.
        degree: g, even and positive.
        head_dim: d.
        value_bound: of every entry of the values, real and prefix; `entry_bound` by default, as in the theorem.
        scale: of the logits, d^-1/2 by default.

    Raises:
        ValueError: if an argument is not positive, or the degree not even.
    """
    value_bound = entry_bound if value_bound is None else value_bound
    scale = head_dim**-0.5 if scale is None else scale
    for name, value in (("entry_bound", entry_bound), ("value_bound", value_bound), ("scale", scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if head_dim < 1 or degree < 2 or degree % 2:
        raise ValueError(f"expected head_dim >= 1 and an even degree >= 2, got {head_dim} and {degree}")
    return 2 * value_bound * math.tanh(log_ratio(scale * head_dim * entry_bound**2, degree) / 4)


def log_ratio(R: float, degree: int) -> float:
    """log(b / a): by how much the weights of two tokens can be off against each other."""
    # Sums of positive terms, in logarithms: log int_0^R t^g e^t / g! dt and log int_0^R t^g e^-t / g! dt.
    terms = range(degree + 1, degree + 1 + 40 + 4 * math.ceil(R))
    log_R = math.log(R)
    below = log_sum([j * log_R - math.lgamma(j + 1) for j in terms]) - R  # 1 - a
    above = log_sum(
        [j * log_R - math.lgamma(j - degree) - math.lgamma(degree + 1) - math.log(j) for j in terms]
    )  # b - 1
    log_b = above + math.log1p(math.exp(-above)) if above > 0 else math.log1p(math.exp(above))
    # Where 1 - a rounds to 1, a = P_g(R) e^-R by its own sum.
    log_a = log_sum([j * log_R - math.lgamma(j + 1) for j in range(degree + 1)]) - R
    if below < -1.0:
        log_a = math.log1p(-math.exp(below))
    return log_b - log_a


def log_sum(logs: list[float]) -> float:
    peak = max(logs)
    return peak + math.log(math.fsum(math.exp(x - peak) for x in logs))


def choose_degree(
    entry_bound: float,
    tolerance: float,
    head_dim: int,
    *,
    value_bound: float | None = None,
    scale: float | None = None,
) -> int:
    """The smallest even degree whose `taylor_error_bound` is at most the tolerance; arguments as there.

    Raises:
        ValueError: if the tolerance is not positive, or no degree up to 64 is enough.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    for degree in range(2, MAX_DEGREE + 1, 2):
        if taylor_error_bound(entry_bound, degree, head_dim, value_bound=value_bound, scale=scale) <= tolerance:
            return degree
    R = (head_dim**-0.5 if scale is None else scale) * head_dim * entry_bound**2
    raise ValueError(
        f"no degree up to {MAX_DEGREE} keeps the error below {tolerance:g} for entries up to {entry_bound:g} and "
        f"head_dim {head_dim}: logits reach {R:g}"
    )
