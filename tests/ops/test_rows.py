"""Rows with different states (`RowStates`), in the kernels and elsewhere, against every row by itself in fp64."""

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from ntk_attention import NTKAttentionConfig, RowStates, ntk_attention
from ntk_attention.ops import fused
from ntk_attention.ops.state import PrefixState
from ntk_attention.ops.triton import decoder, launch, support
from ntk_attention.tuner.layer import NTKAttentionLayer
from research.benchmarks.timing import captured
from tests.reference import relative_error

from .paths import flat, has_kernels, merge_always, path_of, paths, without_hopper
from .test_fused import DEVICE, ON_GPU, SMALL, TOLERANCE, make_inputs, skip_uncovered

INDEX = [2, -1, 0, 2, 1]
CASES = {  # as in test_fused: B, H, H_kv, H_state, L, S, d, d_v, causal, mask, constant feature
    "causal": (5, 4, 4, 4, 70, 70, 64, 64, True, None, True),
    "full, grouped, no constant": (5, 4, 2, 4, 33, 50, 32, 32, False, None, False),
    "state per KV head": (5, 4, 2, 2, 35, 35, 64, 64, True, None, True),
    "bool mask, d 80 and 96": (5, 4, 2, 2, 33, 45, 80, 96, False, "random", True),
    "left padding": (5, 3, 1, 3, 40, 40, 64, 64, False, "left", True),
    "d 128": (5, 2, 1, 2, 67, 67, 128, 128, True, None, True),
    "one program per head": (5, 4, 2, 4, 1, 40, 64, 64, False, None, True),
    "split": (5, 4, 2, 2, 1, 600, 64, 64, False, None, True),
    "split, a short query": (5, 4, 2, 4, 5, 600, 32, 64, False, "random", False),
    "left padding, split": (5, 9, 3, 9, 1, 300, 64, 64, False, "left", True),
    "d 256": (5, 2, 1, 1, 1, 300, 256, 256, False, None, True),
    "halves": (5, 2, 1, 2, 33, 33, 64, 64, True, None, True, "halves", 1),
    "halves, a table for each row": (5, 2, 2, 2, 18, 18, 48, 64, True, None, False, "halves", 5),
    "neighbours": (5, 2, 1, 1, 18, 18, 64, 64, True, None, True, "neighbours", 5),
    "partial, left padding": (5, 2, 1, 2, 33, 33, 96, 96, False, "left", True, "partial", 1),
    "decoding, halves": (5, 4, 2, 4, 1, 40, 64, 64, False, None, True, "halves", 5),
    "decoding, partial, split": (5, 4, 2, 2, 1, 300, 80, 80, False, "left", True, "partial", 5),
}
MERGED = ["causal", "full, grouped, no constant", "state per KV head", "d 128", "halves", "neighbours"]
RANDOM = ["causal", "state per KV head", "left padding", "split", "split, a short query", "halves", "decoding, halves"]
needs_triton = pytest.mark.skipif(support.triton is None, reason="needs Triton")


def make_rows(case, dtype, random_features=None):
    """Query, key and value, the states of three adapters in one stack, and the options."""
    inputs, phi, options = make_inputs(case, dtype, random_features)
    stack = [torch.stack([x, x.flip(0) * 0.5 + x.mean(), x.roll(1, -1) * 2]) for x in inputs[3:]]
    index = torch.tensor(INDEX, dtype=torch.int32, device=DEVICE)
    return inputs[:3], RowStates(*stack, phi, index), options


def rows_alone(inputs, states, options):
    """The reference: every row by itself, those without a state by torch's plain attention."""
    outputs = []
    for i, place in enumerate(states.index.tolist()):
        query, key, value = (x[i : i + 1].double() for x in inputs)
        mask = options["attn_mask"]
        mask = mask[i : i + 1] if mask is not None and len(mask) > 1 else mask
        row = {**options, "attn_mask": mask}
        rotation = row.pop("rotation", None)
        if place < 0:
            out = F.scaled_dot_product_attention(query, key, value, **row)
            outputs.append(out if mask is None else out.masked_fill(~mask.any(dim=-1)[..., None], 0.0))
        else:
            tensors = (x[place].double() for x in (states.Z, states.k, states.log_scale))
            state = PrefixState(*tensors, states.feature_map)
            if rotation is not None and len(rotation.table) > 1:
                rotation = rotation._replace(table=rotation.table[i : i + 1])
            outputs.append(ntk_attention(query, key, value, state, rotation=rotation, backend="eager", **row))
    return torch.cat(outputs)


def check(actual, expected, tolerance):
    for i, (a, e) in enumerate(zip(actual.double(), expected, strict=True)):
        error = (a - e).norm() / e.norm()
        assert error < tolerance, (i, error)


def by_kernel(inputs, states, options):
    query, key, value = inputs
    path = path_of(query, key, value, states, options["attn_mask"], rotation=options.get("rotation"), backend="triton")
    assert path.is_fused
    return ntk_attention(query, key, value, states, backend="triton", **options)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels(name, dtype):
    skip_uncovered(name, dtype)
    arguments = make_rows(CASES[name], dtype)
    check(by_kernel(*arguments), rows_alone(*arguments), TOLERANCE[dtype])


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", RANDOM)
def test_positive_random_features(name):
    arguments = make_rows(CASES[name], torch.bfloat16, random_features=40)
    check(by_kernel(*arguments), rows_alone(*arguments), TOLERANCE[torch.bfloat16])


@needs_triton
@pytest.mark.parametrize("name", MERGED)
def test_merged_into_the_library_kernel(name, monkeypatch):
    merge_always(monkeypatch)
    inputs, states, options = make_rows(CASES[name], torch.bfloat16)
    out = ntk_attention(*inputs, states, **options)
    check(out, rows_alone(inputs, states, options), TOLERANCE[torch.bfloat16])


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(support.forward_sm90 is None, reason="there is no other kernel")
@pytest.mark.parametrize("name", MERGED)
def test_on_a_gpu_that_is_not_a_hopper(name, monkeypatch):
    without_hopper(monkeypatch)
    test_kernels(name, torch.bfloat16)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("random_features", [None, 40], ids=["elu", "positive random"])
@pytest.mark.parametrize(
    "name", ["causal", "halves", "left padding", "left padding, split", "decoding, halves", "merged"]
)
def test_a_row_without_a_state_is_the_same_to_the_last_bit_whatever_the_stack(name, random_features, monkeypatch):
    if name == "merged":
        merge_always(monkeypatch)
        name = "causal"
    inputs, states, options = make_rows(CASES[name], torch.bfloat16, random_features)
    without = states.index < 0
    out = ntk_attention(*inputs, states, **options)
    larger = (1e6 * states.Z, 1e6 * states.k, states.log_scale + 40)
    plain = ntk_attention(*inputs, RowStates(*larger, states.feature_map, torch.full_like(states.index, -1)), **options)
    assert torch.equal(out[without], plain[without])
    weightless = states.Z[0], torch.zeros_like(states.k[0]), states.log_scale[0]
    expected = ntk_attention(*inputs, PrefixState.trusted(*weightless, states.feature_map), **options)
    check(plain, expected.double(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("split", "d 128", "d 256")])
def test_in_torch_operations(name, backend, dtype):
    inputs, states, options = make_rows(CASES[name], dtype)
    states = RowStates(*(x.to(dtype) for x in (states.Z, states.k, states.log_scale)), states.feature_map, states.index)
    out = ntk_attention(*inputs, states, backend=backend, **options)
    check(out, rows_alone(inputs, states, options), 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", ["state per KV head", "halves, a table for each row"])
def test_gradients(name):
    """Each state gets those of its rows; where gradients are wanted no kernel of ours runs."""
    inputs, states, options = make_rows(CASES[name], torch.float64)
    leaves = [x.double().requires_grad_() for x in (*inputs, states.Z, states.k, states.log_scale)]
    states = RowStates(*leaves[3:], states.feature_map, states.index)
    actual = torch.autograd.grad(ntk_attention(*leaves[:3], states, **options).square().sum(), leaves)
    expected = torch.autograd.grad(rows_alone(leaves[:3], states, options).square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-12
    halves = [x.to(torch.bfloat16) for x in leaves[:3]]
    assert not path_of(*halves, states).is_fused
    with torch.no_grad():
        assert path_of(*halves, states).is_fused == has_kernels(halves[0], halves[2])


@needs_triton
def test_a_stack_too_large_for_the_kernels():
    (query, key, value), states, _ = make_rows(CASES["causal"], torch.bfloat16)
    assert path_of(query, key, value, states).is_fused
    stack = (x[:1].expand(2**17, *x.shape[1:]) for x in (states.Z, states.k, states.log_scale))
    assert not path_of(query, key, value, RowStates(*stack, states.feature_map, states.index)).is_fused


@needs_triton
@pytest.mark.parametrize("name", ["causal", "left padding, split"])
def test_what_changes_in_place_counts(name):
    inputs, states, options = make_rows(CASES[name], torch.bfloat16)
    by_kernel(inputs, states, options)
    states.index.copy_(torch.tensor([-1, 1, 2, 0, 1]))
    states.Z[1].copy_(states.Z[0] * 3)
    check(by_kernel(inputs, states, options), rows_alone(inputs, states, options), TOLERANCE[torch.bfloat16])


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ["causal", "left padding, split", "halves", "decoding, halves"])
def test_compiles_to_one_graph(name):
    inputs, states, options = make_rows(CASES[name], torch.bfloat16)

    @torch.compile(fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    def compiled(query, key, value, Z, k, b, index):
        rows = RowStates(Z, k, b, states.feature_map, index)
        return ntk_attention(query, key, value, rows, backend="triton", **options)

    out = compiled(*inputs, states.Z, states.k, states.log_scale, states.index)
    assert torch.equal(out, by_kernel(inputs, states, options))


@needs_triton
@pytest.mark.parametrize("kind", ["plain", "halves"])
def test_operators(kind):
    inputs, states, options = make_rows((5, *SMALL[kind][1:]), torch.bfloat16)
    tensors, rotation = [*inputs, states.Z, states.k, states.log_scale], options.get("rotation")
    for path in paths(inputs[0], inputs[2]):
        arguments = *flat(tensors, states.index, rotation=rotation), path
        torch.library.opcheck(fused.forward_op, arguments, test_utils=("test_schema", "test_faketensor"))
    rotation = None if rotation is None else rotation.rows(0, 1)
    arguments = flat([inputs[0][:, :, :1], *tensors[1:]], states.index, rotation=rotation, is_causal=False)
    torch.library.opcheck(fused.decode_op, arguments)


def test_bad_rows():
    (query, key, value), states, _ = make_rows(CASES["causal"], torch.float32)
    with pytest.raises(ValueError, match="an index of 5 rows for a batch of 2: expected as many"):
        ntk_attention(query[:2], key[:2], value[:2], states)
    state = PrefixState(states.Z[0], states.k[0], states.log_scale[0], states.feature_map)
    for index in (states.index.long(), states.index[:, None]):
        with pytest.raises(ValueError, match=r"index must be int32 \[B\] on "):
            RowStates.stack([state], index)
    fewer = PrefixState(states.Z[0, :2], states.k[0, :2], states.log_scale[0, :2], states.feature_map)
    with pytest.raises(ValueError, match="the rows of a batch need states of one shape and feature map"):
        RowStates.stack([state, fewer], states.index)


def small_llama(dtype):
    """One whose heads are large enough for the kernels."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config = NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False)
    model = get_peft_model(LlamaForCausalLM(llama).to(DEVICE), config, adapter_name="first")
    for name in ("second", "third"):
        model.add_adapter(name, config)
    return model.to(dtype).eval()


NAMES = ["second", "__base__", "first", "second", "third"]
OTHERS = ["third", "first", "__base__", "second", "second"]


def logits_alone(model, ids, names):
    """Every row by itself, through the ordinary path."""
    rows = []
    for row, name in zip(ids, names, strict=True):
        model.set_adapter("first" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.no_grad():
            rows.append(model(row[None]).logits)
    return torch.cat(rows)


@needs_triton
def test_a_model_uses_the_kernels(monkeypatch):
    model = small_llama(torch.bfloat16)
    ids = torch.randint(3, 64, (5, 9), device=DEVICE)
    calls = []
    forward, decode = launch.fused_forward, decoder.decode
    monkeypatch.setattr(launch, "fused_forward", lambda *a: calls.append("forward") or forward(*a))
    monkeypatch.setattr(decoder, "decode", lambda *a: calls.append("decode") or decode(*a))
    logits = model(ids, adapter_names=NAMES).logits  # no gradients, though nobody said so
    model.generate(input_ids=ids, attention_mask=ids > 0, adapter_names=NAMES, max_new_tokens=2, min_new_tokens=2)
    assert calls == ["forward"] * 4 + ["decode"] * 2
    assert not logits.requires_grad
    with torch.no_grad():
        check(logits, logits_alone(model.double(), ids, NAMES), 2.5e-2)


@pytest.mark.slow
@needs_triton
def test_a_decoding_step_sees_other_rows_and_states():
    """On a GPU it is a replay of a CUDA graph that sees them."""
    inputs, states, options = make_rows(CASES["left padding, split"], torch.bfloat16)
    out = torch.empty_like(inputs[0])
    step = captured(lambda: out.copy_(by_kernel(inputs, states, options)), DEVICE)
    for index in (INDEX, [0, 0, -1, 1, 2]):
        states.index.copy_(torch.tensor(index))
        states.Z[1].normal_()
        step()
        assert torch.equal(out, by_kernel(inputs, states, options))
        check(out, rows_alone(inputs, states, options), TOLERANCE[torch.bfloat16])


@pytest.mark.slow
@needs_triton
def test_a_decoding_model_swaps_adapters():
    """The same."""
    model = small_llama(torch.bfloat16)
    token = torch.randint(3, 64, (5, 1), device=DEVICE)
    cache = StaticCache(config=model.config, max_cache_len=32)
    cache.early_initialization(5, 2, 16, torch.bfloat16, torch.device(DEVICE))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    logits = torch.empty(5, 1, 64, dtype=torch.bfloat16, device=DEVICE)

    def run():
        for layer in cache.layers:
            layer.cumulative_length.fill_(20)
        logits.copy_(model(input_ids=token, past_key_values=cache, use_cache=True).logits)

    def alone(names):
        outputs = []
        for name in names:
            model.set_adapter("first" if name == "__base__" else name)
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                run()
            outputs.append(logits[len(outputs)].clone())
        return outputs

    with torch.no_grad():
        with model.mixed_batch(NAMES) as batch:
            step = captured(run, DEVICE)
            step()
            first = logits.clone()
            batch.assign(OTHERS)
            step()
            second = logits.clone()
            for module in model.modules():
                if isinstance(module, NTKAttentionLayer):
                    module["third"].Z_A.mul_(2)
            step()
            assert torch.equal(logits, second)  # not yet
            batch.update("third")
            step()
            third = logits.clone()
        check(third, alone(OTHERS), 2.5e-2)
        assert [not torch.equal(a, b) for a, b in zip(third, second, strict=True)] == [n == "third" for n in OTHERS]
        unchanged = [a == b for a, b in zip(NAMES, OTHERS, strict=True)]
        assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == unchanged
