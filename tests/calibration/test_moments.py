"""The statistics of rows against sums and loops."""

import pytest
import torch

from ntk_attention.calibration.moments import SecondMoments, inverse_root, select_rows, whitening


@pytest.mark.parametrize("shape", [(), (5,)], ids=["numbers", "vectors"])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_selected_rows_against_a_loop(heads, shape):
    x, counts = torch.randn(3, 4, 6, *shape), torch.rand(3, 6) < 0.5
    actual = select_rows(x, counts, heads)
    of_state = x.split(4 // heads, dim=1)
    for found, queries in zip(actual, of_state, strict=True):
        expected = [queries[b, h, t] for h in range(4 // heads) for b in range(3) for t in range(6) if counts[b, t]]
        assert torch.equal(found, torch.stack(expected))


def test_moments_are_a_mean_over_kinds():
    """However many rows a kind has, and without kinds of which there are none."""
    moments = SecondMoments((2, 3, 3), torch.float64, torch.device("cpu"))
    kinds = [torch.randn(2, n, 3, dtype=torch.float64) for n in (4, 0, 50)]
    for rows in kinds:
        for part in rows.split(20, dim=1):
            moments.add(part)
        moments.end_kind()
    expected = [torch.einsum("hni,hnj->hij", x, x) / x.shape[1] for x in kinds if x.shape[1]]
    assert len(moments.kinds) == 2
    torch.testing.assert_close(moments.mean(), (expected[0] + expected[1]) / 2)


def test_inverse_root_against_the_identity():
    rows = torch.randn(3, 50, 5, dtype=torch.float64)
    moments = rows.mT @ rows
    C = inverse_root(moments, 1e-3)
    torch.testing.assert_close(C, C.mT)
    torch.testing.assert_close(C @ moments @ C, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))


def test_eigenvalues_under_the_floor_count_as_the_floor():
    C = inverse_root(torch.diag(torch.tensor([4.0, 1.0, 1e-9], dtype=torch.float64)), 1e-2)
    torch.testing.assert_close(C.diagonal(), torch.tensor([0.5, 1.0, 5.0], dtype=torch.float64))


def test_whitening_against_the_identity():
    features = torch.cat(
        [torch.randn(2, 50, 5, dtype=torch.float64) + 3, torch.ones(2, 50, 1, dtype=torch.float64)], -1
    )
    gram = features.mT @ features
    C = whitening(gram, 1e-3)
    torch.testing.assert_close(C.mT @ gram @ C, torch.eye(6, dtype=torch.float64).expand(2, 6, 6))
    assert C[:, :-1, -1].abs().max() == 0  # the constant feature stays itself
