"""Fitting and distillation: the problems against their optimality conditions, tiny models against a prefix."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from ntk_attention import LayerPrefix, NTKAttentionConfig
from ntk_attention.convert import adapter_from_prefix, anchor, by_layer, distill, fit
from ntk_attention.convert.distillation import set_coordinates
from ntk_attention.convert.fitting import AdapterFit, Sums, nonnegative, of_rank, own_variance, ridge_regression
from ntk_attention.convert.own_text import SOURCES, study
from ntk_attention.ops.attention import attend
from ntk_attention.ops.bundles import Prefixes, Tokens
from ntk_attention.ops.reference import Block, prefix_block
from ntk_attention.tuner.adapter import PrefixAdapter
from ntk_attention.tuner.calls import CALLS, exact_prefix
from ntk_attention.tuner.geometry import Geometry
from ntk_attention.tuner.observation import adapted_layers

from .test_prefixes import TEXT, M, error, filled_cache, llama, prefix_of_cache, with_the_text

IDS = torch.randint(0, 50, (48, 12), generator=torch.Generator().manual_seed(3))
BATCHES = [{"input_ids": part} for part in IDS.split(8)]
MAPS = {
    "elu": {},
    "elu, one per KV head": {"state_heads": "kv"},
    "elu, rank 3": {"rank": 3},
    "positive_random": {"feature_map": "positive_random"},
    "without the constant": {"feature_map": "positive_random", "constant_feature": False},
    "taylor": {"feature_map": "taylor", "constant_feature": False},
}


@pytest.fixture(scope="module")
def prefix():
    model = llama()
    return prefix_of_cache(model, filled_cache(model))


def adapted(options):
    torch.manual_seed(0)
    return get_peft_model(llama(), NTKAttentionConfig(task_type="CAUSAL_LM", **options).for_given_prefix()).eval()


@torch.no_grad()
def after_the_prefix(model):
    return model(input_ids=TEXT[:, M:]).logits


def sums(H=2, N=200, r=7, outputs=3, seed=0):
    torch.manual_seed(seed)
    g, y = torch.rand(H, N, r, dtype=torch.float64) + 0.5, torch.randn(H, N, outputs, dtype=torch.float64)
    out = Sums(H, r, outputs, torch.device("cpu"))
    for i in range(0, N, 37):  # in parts
        out.add(g[:, i : i + 37], y[:, i : i + 37])
    return g, y, out


def plain(sums):
    return torch.ones_like(sums.moment[..., 0])


def test_ridge_regression():
    """Against least squares of the rows themselves, with the ridge as more rows."""
    g, y, total = sums()
    ridge = torch.tensor([0.5, 2.0], dtype=torch.float64)
    more = ridge.sqrt()[:, None, None] * torch.eye(7, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([g, more], 1), torch.cat([y, torch.zeros(2, 7, 3).double()], 1)).solution
    actual = ridge_regression(total, ridge, plain)
    assert torch.allclose(actual, expected)
    assert torch.allclose(total.error(actual), (g @ actual - y).square().sum((1, 2)))
    centred = g - g[..., -1:] * (g[..., -1:] * g).sum(1, keepdim=True) / g[..., -1:].square().sum(1, keepdim=True)
    assert torch.allclose(own_variance(total, 6)[:, :-1], centred.square().sum(1)[:, :-1])


def test_nonnegative_least_squares():
    """The optimality conditions: no gradient where k is free, a positive one where it is at 0."""
    g, _, _ = sums()
    y = g @ torch.tensor([1.0, 0.5, -0.5, 0.0, 2.0, -1.0, 0.3]).double()[:, None] + 0.1 * torch.rand(2, 200, 1)
    total = Sums(2, 7, 1, torch.device("cpu"))
    total.add(g, y)
    positive = torch.tensor([True] * 5 + [False] * 2)
    k = nonnegative(total, torch.full((2,), 1e-3, dtype=torch.float64), plain, positive)
    gradient = (g.transpose(1, 2) @ (g @ k[..., None] - y))[..., 0] + 1e-3 * k
    at_zero = positive & (k < 1e-5)
    assert (k[:, positive] > 0).all()
    assert at_zero.any()
    assert (~at_zero & positive).any()
    assert (gradient[~at_zero].abs() < 1e-4).all()
    assert (gradient[at_zero] > 0).all()


def test_reduced_rank():
    """No matrix near it, of the same rank, has a smaller error."""
    _, _, total = sums(r=6, outputs=5)
    full = ridge_regression(total, torch.zeros(2, dtype=torch.float64), plain)
    best = of_rank(full, total, 2)
    assert torch.linalg.matrix_rank(best, rtol=1e-9).tolist() == [2, 2]
    U, S, V = torch.linalg.svd(best)
    for _ in range(20):
        A = U[..., :2] * S[:, None, :2] + 1e-3 * torch.randn(2, 6, 2)
        assert (total.error(A @ (V[:, :2] + 1e-3 * torch.randn(2, 2, 5))) > total.error(best)).all()


@pytest.mark.parametrize("name", ["elu", "positive_random"])
def test_a_prefix_that_is_a_state_is_found(name):
    """Queries against the block of a known state: the fit has its outputs and its share, whatever the features."""
    options = {"num_features": 12} if name == "positive_random" else {}
    config = NTKAttentionConfig(feature_map=name, feature_map_options=options, init_weights=False)
    torch.manual_seed(5)
    known, fitted = (PrefixAdapter(config, Geometry(4, 4, 6, 5)).double() for _ in range(2))
    blocks = []
    for seed in range(8):
        torch.manual_seed(seed)
        query = torch.randn(3, 4, 50, 6, dtype=torch.float64)
        context = Block(torch.randn(3, 4, 50, 5).double(), torch.randn(3, 4, 50).double())
        blocks.append((query, context, prefix_block(query, known.state(), 0.6), 0.6 * query, torch.ones(3, 50).bool()))
    fit = AdapterFit(fitted, len(blocks))
    for args in blocks:
        fit.observe_normaliser(*args)
    fit.solve_normaliser()
    for args in blocks:
        fit.observe_values(*args)
    fit.solve_values()
    assert fit.error.max() < 1e-2
    assert fit.share_error.max() < 1e-2


@pytest.mark.parametrize("name", MAPS)
def test_a_fitted_state_stands_for_a_text(prefix, name):
    """On text that calibration never saw, against no prefix and against the sums over the prefix."""
    model = llama()
    expected = with_the_text(model)
    without = error(model(input_ids=TEXT[:, M:]).logits, expected)
    options = MAPS[name]
    direct = adapter_from_prefix(llama(), prefix, NTKAttentionConfig(**options)).eval()
    model = adapted(options)
    report = fit(model, by_layer(model, prefix), BATCHES)
    fitted = error(after_the_prefix(model), expected)
    assert fitted < 0.1 * without
    assert fitted < 0.75 * error(after_the_prefix(direct), expected)
    assert report.mean_error() < 0.2
    assert report.error.keys() == adapted_layers(model).keys()


def test_anchored_features(prefix, tmp_path):
    """Directions at the keys that are looked at most; with all 40 keys the state is the prefix itself."""
    expected = with_the_text(llama())
    errors = []
    for n in (16, 2 * M):
        model = adapted({"feature_map": "anchored", "feature_map_options": {"num_features": n}})
        named = by_layer(model, prefix)
        anchor(model, named, BATCHES)
        fit(model, named, BATCHES)
        errors.append(error(after_the_prefix(model), expected))
    assert errors[0] < 0.06
    assert errors[1] < 0.2 * errors[0]
    name, tokens = next(iter(named.items()))
    projection = adapted_layers(model)[name]["default"].feature_map.projection
    keys = tokens.keys.flatten(0, 1) * 8**-0.25  # d = 8
    assert torch.cdist(keys, projection.double()).amin(dim=1).max() < 1e-5
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert error(after_the_prefix(loaded), after_the_prefix(model)) < 1e-5
    with pytest.raises(ValueError, match="has the feature map 'elu', expected 'anchored'"):
        anchor(adapted({}), named, BATCHES)
    with pytest.raises(ValueError, match="sums over tokens say nothing with the map 'anchored'"):
        adapter_from_prefix(llama(), prefix, NTKAttentionConfig(feature_map="anchored"))


@torch.no_grad()
def test_the_teacher_is_the_model_with_the_prefix(prefix):
    model = adapted({})
    layers = adapted_layers(model)
    with exact_prefix(layers, by_layer(model, prefix), resting=layers):
        assert error(after_the_prefix(model), with_the_text(llama())) < 1e-6
    assert not CALLS.exact
    assert not CALLS.resting


@pytest.mark.parametrize("weights", [False, True])
def test_gradients_of_real_prefix_tokens(weights):
    """The written-out scores against the kernel, in value, and against differences, in gradient."""
    torch.manual_seed(0)
    shapes = [(2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 7, 8), (2, 7, 8), *([(2, 7)] if weights else [])]
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(query, key, value, *prefix):
        tokens = Tokens(query, key, value, is_causal=True, scale=8**-0.5)
        return attend(tokens, Prefixes([], 1.0, exact=LayerPrefix(*prefix)))

    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    if not weights:
        with torch.no_grad():
            kernel = run(*tensors)
        assert torch.allclose(run(*tensors), kernel)


def test_tokens_that_are_kept(prefix):
    """The last ten tokens stay: the state stands for the others only, and the rest is nearer to the text."""
    expected = with_the_text(llama())
    model = adapted({})
    named = by_layer(model, prefix)
    gone, kept = ({n: LayerPrefix(p.keys[:, s], p.values[:, s]) for n, p in named.items()} for s in
                  (slice(0, M - 10), slice(M - 10, None)))  # fmt: skip
    fit(model, gone, BATCHES, kept=kept)
    with exact_prefix(adapted_layers(model), kept):
        both = error(after_the_prefix(model), expected)
    fit(model, named, BATCHES)
    assert both < 0.9 * error(after_the_prefix(model), expected)


@pytest.mark.parametrize("name", ["elu", "elu, rank 3", "without the constant"])
def test_distillation(prefix, name, tmp_path):
    """KL falls on text that was not trained on; coordinates change nothing, and files hold plain tensors."""
    expected = with_the_text(llama())
    model = adapted(MAPS[name])
    named = by_layer(model, prefix)
    fit(model, named, BATCHES)
    before = after_the_prefix(model)
    set_coordinates(model, BATCHES)
    assert error(after_the_prefix(model), before) < 1e-5
    history = distill(model, named, BATCHES, steps=60, learning_rate=3e-3)
    assert len(history) == 60
    assert sum(history[-6:]) < 0.8 * sum(history[:6])
    assert error(after_the_prefix(model), expected) < error(before, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert error(after_the_prefix(loaded), after_the_prefix(model)) < 1e-5


@pytest.mark.parametrize("source", SOURCES)
def test_study(prefix, source):
    class Tokenizer:
        pad_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [ord(c) % 50 for c in text]}

    def write(seed):
        model = adapted({})
        options = {"rows": 12, "length": 70, "batch_size": 4, "seed": seed, "source": source}
        return study(model, Tokenizer(), by_layer(model, prefix), TEXT[0, :M].repeat(3), **options)

    first, again, other = write(0), write(0), write(1)
    assert [tuple(batch["input_ids"].shape) for batch in first] == [(4, 70)] * 3
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])


def test_bad_calls(prefix):
    model = adapted({"layers_to_transform": [1]})
    named = by_layer(model, prefix)
    assert list(named) == ["base_model.model.model.layers.1.self_attn.ntk_states"]
    with pytest.raises(ValueError, match=r"fit needs two batches or more, .* got 1"):
        fit(model, named, BATCHES[:1])
    with pytest.raises(ValueError, match="the prefix is for no layer, the adapter has base_model"):
        fit(model, {}, BATCHES)
    with pytest.raises(ValueError, match="distill got no batches"):
        distill(model, named, [])
    with pytest.raises(ValueError, match="unknown source of calibration text 'dreams'"):
        study(model, None, named, TEXT[0], source="dreams")
