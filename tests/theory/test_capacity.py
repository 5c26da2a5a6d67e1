"""Every statement about what a state holds, on 1,000 random instances or as many as are said; tests carry its name."""

import itertools
import math

import pytest
import torch

from ntk_attention.theory import run_capacity
from ntk_attention.theory.capacity import (
    best_normaliser,
    decodable_pairs,
    every_state,
    exact_states,
    generic_pairs,
    log_dichotomies,
    lost_values,
    nearest_answers,
    nearest_output,
    rank_tail,
    reach,
    sharp_tail,
    wrong_signs,
)
from ntk_attention.theory.setting import Setting

N = 1000


def rand(*size, seed):
    return torch.rand(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randn(*size, seed):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rank_independent_features_return_everything():
    """m <= r: any k > 0 will do, and Z is Phi^+ D V."""
    for seed in range(N):
        m, r, d_v = [(1, 1, 1), (3, 5, 2), (6, 6, 4), (8, 16, 8)][seed % 4]
        Phi, k, V = rand(m, r, seed=seed), rand(r, seed=N + seed) + 0.1, randn(m, d_v, seed=2 * N + seed)
        torch.testing.assert_close(nearest_output(reach(Phi, k), V), V, atol=1e-7, rtol=1e-7)
        with pytest.raises(ValueError, match=f"the {m} rows of Phi are independent"):
            lost_values(Phi)


def test_rank_one_more_is_lost():
    """m > r: some values of size 1 no state is nearer to than 1 everywhere, whatever its k; 0 is as near as that."""
    for seed in range(N):
        m, r = [(2, 1), (5, 3), (9, 8), (20, 6)][seed % 4]
        Phi = rand(m, r, seed=seed)
        v = lost_values(Phi)
        assert v.abs().max() == 1
        generator = torch.Generator().manual_seed(N + seed)
        k = 10 ** (3 * torch.rand(64, r, dtype=torch.float64, generator=generator))
        z = torch.randn(64, r, dtype=torch.float64, generator=generator) * k
        aimed = torch.stack([torch.linalg.lstsq(Phi, (Phi @ k_) * v).solution for k_ in k[:8]])  # and near misses
        for Z, weights in ((z, k), (aimed, k[:8])):
            F = (Z @ Phi.T) / (weights @ Phi.T)
            assert ((F - v).abs().amax(dim=1) >= 1 - 1e-9).all()


def test_rank_of_radon():
    """m = r + 1, d_v = 1: exact if and only if the values of both signs of the dependency have a common inner point."""
    possible = 0
    for seed in range(N):
        r = 2 + seed % 5
        Phi, V = rand(r + 1, r, seed=seed), randn(r + 1, seed=N + seed)
        n = torch.linalg.svd(Phi)[0][:, -1]
        if n.abs().min() < 1e-2:  # too near to fewer rows for float64
            continue
        up, down = V[n > 0], V[n < 0]
        low, high = max(up.min(), down.min()), min(up.max(), down.max())
        if low > high:  # a threshold parts them: these are lost values, moved
            continue
        D = torch.empty_like(V)
        for side in (n > 0, n < 0):  # positive weights whose mean value is the middle
            middle, own = (low + high) / 2, V[side]
            end = own.min() if own.mean() > middle else own.max()
            part = 0.0 if len(own) == 1 else ((middle - own.mean()) / (end - own.mean())).item()
            weights = torch.full_like(own, (1 - part) / len(own)) + part * (own == end).double()
            D[side] = weights / n[side].abs()
        assert (D > 0).all()
        k, Z = torch.linalg.pinv(Phi) @ D, torch.linalg.pinv(Phi) @ (D * V)
        assert (Phi @ k > 0).all()
        for made, wanted in ((Phi @ k, D), (Phi @ Z, D * V)):
            torch.testing.assert_close(made, wanted, atol=1e-8 * D.max().item(), rtol=0)
        possible += 1
    assert N / 4 < possible < N


def test_counting():
    """Of random values with m d_v <= r d_v + r - 1 there are exact states, as many as counted; of more none."""
    cases = [(r, d_v) for r in (1, 2, 3, 5, 8) for d_v in (1, 2, 4, 8)]
    for seed in range(N):
        r, d_v = cases[seed % len(cases)]
        bound = generic_pairs(r, d_v)
        assert bound == r + (r - 1) // d_v
        for m in (max(1, bound - seed % 3), bound, bound + 1):
            Phi, V = rand(m, r, seed=seed), randn(m, d_v, seed=N + seed)
            Z, k = exact_states(Phi, V)
            assert len(k) == max(0, r * d_v + r - m * d_v)
            if len(k):
                weight = Phi @ k[0]
                assert weight.abs().max() > 0
                torch.testing.assert_close(Phi @ Z[0], weight[:, None] * V, atol=1e-9, rtol=0)


def test_counting_of_the_paper_and_of_fitted_features():
    assert generic_pairs(64, 64) == 64  # r = d = d_v
    assert generic_pairs(64, 1) == 127
    assert generic_pairs(10, 4, phi_parameters=10 * 4) == 22  # a cache of 10 free keys: r (d + d_v + 1) - 1 numbers


def patterns(Phi, seed, tries=20_000):
    """The sign patterns that random states give: all of them, or nearly."""
    signs = (randn(tries, Phi.shape[1], seed=seed) @ Phi.T > 0).int()
    return {tuple(row) for row in signs.tolist()}


def test_dichotomies():
    for seed in range(20):
        m, r = [(4, 2), (6, 3), (7, 2), (3, 5)][seed % 4]
        found = patterns(rand(m, r, seed=seed) - 0.3, seed)
        assert len(found) <= round(math.exp(log_dichotomies(m, r)))
        if r > 2 and m < 7:  # sampling finds the thin cells, too, where they are few
            assert len(found) >= 0.7 * math.exp(log_dichotomies(m, r))
    assert math.exp(log_dichotomies(5, 5)) == pytest.approx(2**5)
    assert math.exp(log_dichotomies(8, 4)) == pytest.approx(2**8 / 2)  # half of them at m = 2 r


def test_wrong_signs_and_every_state():
    """Against all states: every labelling's nearest pattern; and the best squared error that L-BFGS finds."""
    for seed, (m, r) in enumerate([(5, 1), (6, 2), (7, 3), (7, 2)]):
        Phi = rand(m, r, seed=seed) + 0.01
        found = torch.tensor(sorted(patterns(Phi, seed)))
        labels = torch.tensor(list(itertools.product((0, 1), repeat=m)))
        wrong = torch.stack([(found != label).sum(dim=1).min() for label in labels]).double() / m
        assert wrong.mean() >= wrong_signs(m, r) > 0
        lost = []
        for T in (2.0 * labels.double() - 1)[..., None]:
            F = nearest_output(reach(Phi, best_normaliser(Phi, T)), T)
            lost.append((F - T).square().mean())
        assert (torch.stack(lost) >= 2 * wrong - 1e-9).all()  # of every labelling, so on average
        assert torch.stack(lost).mean() >= every_state(m, r) > 0
    assert wrong_signs(8, 8) == pytest.approx(0, abs=1e-12)
    assert every_state(20_000, 10) > 0.9  # next to nothing is kept


def test_decoding():
    """Tables of m pairs that random states tell apart are no more than the bound counts, and not all beyond it."""
    r, d_v, N_values = 2, 1, 3
    codes = torch.tensor([[-1.0], [0.2], [1.0]], dtype=torch.float64)
    m = decodable_pairs(r, d_v, N_values) + 1
    assert N_values**m > math.exp(log_dichotomies(m * N_values * (N_values - 1) // 2, r * (d_v + 1)))
    Phi = rand(m, r, seed=0)
    tables = set()
    for seed in range(1000):
        Z, k = randn(r, d_v, seed=seed), rand(r, seed=N + seed) + 1e-3
        F = (Phi @ Z) / (Phi @ k)[:, None]
        tables.add(tuple(torch.cdist(F, codes).argmin(dim=1).tolist()))
    assert 10 < len(tables) <= math.exp(log_dichotomies(m * 3, r * (d_v + 1)))
    assert decodable_pairs(32, 32, 256) > 32 * 33
    assert decodable_pairs(64, 32, 256) > 1.9 * decodable_pairs(32, 32, 256)


def attention(m, beta, seed):
    keys = torch.nn.functional.normalize(randn(m, 8, seed=seed), dim=1)
    return torch.softmax(beta * keys @ keys.T, dim=1)


def test_rank_tail():
    """No k that is chosen before V loses less on average, and the singular vectors lose just that."""
    for seed in range(N):
        m, r, beta = [(6, 2, 1.0), (12, 5, 4.0), (20, 8, 20.0)][seed % 3]
        S = attention(m, beta, seed)
        tail = rank_tail(S, r)
        A = reach(rand(m, r, seed=N + seed), rand(r, seed=seed) + 0.1)
        lost = 1 - (A.T @ S).square().sum() / S.square().sum()  # |S V - A A^T S V|^2 on average over V
        assert lost >= tail - 1e-12
        best = torch.linalg.svd(S)[0][:, :r]
        assert 1 - (best.T @ S).square().sum() / S.square().sum() == pytest.approx(tail, abs=1e-12)
        assert tail >= sharp_tail(m, r, S.diagonal().min().item()) - 1e-12


def test_sharp_tail():
    """It is near (m - r) / m for sharp logits, and nothing for blunt ones."""
    for r in (0, 3, 10):
        assert sharp_tail(40, r, 1.0) == pytest.approx((40 - r) / 40)
        S = attention(40, 200.0, r)
        assert rank_tail(S, r) == pytest.approx((40 - r) / 40, abs=0.02)
    assert sharp_tail(10, 10, 0.9) == 0
    assert sharp_tail(100, 5, 0.02) == 0


def test_blunt_logits_need_few_features():
    """|logits| <= 1/2: the r = C(d + 2, 2) monomials lose next to nothing of any number of pairs."""
    tails = [rank_tail(attention(m, 0.5, m), math.comb(8 + 2, 2)) for m in (100, 400)]
    assert max(tails) < 1e-5


def test_best_normaliser():
    """It is not worse than where it starts, and finds a state that is there."""
    gains = []
    for seed in range(10):
        Phi, V = rand(12, 4, seed=seed), randn(12, 3, seed=100 + seed)
        k = best_normaliser(Phi, V)
        assert (k > 0).all()
        same = (nearest_output(reach(Phi, torch.ones(4, dtype=torch.float64)), V) - V).square().sum()
        solved = (nearest_output(reach(Phi, k), V) - V).square().sum()
        gains.append((solved / same).item())
    assert max(gains) < 1.02
    assert min(gains) < 0.95
    Phi, k = rand(30, 4, seed=0), torch.tensor([1.0, 8.0, 0.2, 3.0], dtype=torch.float64)
    V = nearest_output(reach(Phi, k), randn(30, 6, seed=1))
    found = nearest_output(reach(Phi, best_normaliser(Phi, V)), V)
    assert (found - V).square().sum() < 1e-4 * V.square().sum()
    with pytest.raises(ValueError, match=r"must not be negative, got one of -0\.1"):
        best_normaliser(Phi - Phi.min() - 0.1, V)


def test_answers_outnumber_exact_values():
    """A state trained for the right answers tells twice as many values apart as it has features; not least squares."""
    m, r = 32, 16
    A, V = reach(rand(m, r, seed=0), torch.ones(r, dtype=torch.float64)), randn(m, 16, seed=1).sign()
    assert run_capacity.share_right(nearest_answers(A, V), V) == 1
    assert run_capacity.share_right(nearest_output(A, V), V) < 1


def test_facts_and_counts_of_one_draw():
    row = run_capacity.facts(Setting(), "anchored", 8, 8, 32.0, 0)
    assert (row["exact"], row["right_squares"], row["right_answers"]) == (8, 1, 1)
    row = run_capacity.facts(Setting(), "elu", 32, 64, 32.0, 0)
    assert row["exact"] <= generic_pairs(32, run_capacity.D)
    assert row["lost_same"] >= row["tail"] - 1e-12
    assert row["lost_solved"] >= row["every_state"]
    assert run_capacity.counted(Setting(), 4, 3, 0)["reached"] == 5
