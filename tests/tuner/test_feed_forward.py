"""Prefixes of feed-forward blocks: where they go, what they add, how they start, and what files of them hold."""

from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.calibration.settings import DEFAULT
from ntk_attention.tuner.coordinates import solve_by_qr
from ntk_attention.tuner.feed_forward import FeedForwardPrefix, FeedForwardRows, feed_forwards, parts_inside
from ntk_attention.tuner.geometry import PartSize
from ntk_attention.tuner.routing import routes
from ntk_attention.tuner.untrusted import WEIGHTS
from tests.families import FAMILIES
from tests.reference import relative_error
from tests.tiny import INPUTS, TINY, adapted, adapters, logits, loss_of, tiny

BLOCKS = {"whisper": 4, "t5": 4, "bart": 4, "albert": 1, "clip": 4, "siglip": 4}  # of tiny models; 2 of all others


def attention_of(model):
    return [name for name, module in model.named_modules() if name and routes(module)]


def float64(name, **options):
    family = FAMILIES[name]
    torch.manual_seed(2)
    config = NTKAttentionConfig(**{"init_weights": False, "feed_forward_rank": 3, **options})
    return family, get_peft_model(family.build(), config, autocast_adapter_dtype=False).double().eval()


def plain(model):
    """Z_A and Z_B of every part as a file would hold them, by the names of the attention module and of the part."""
    inside = ".ntk_states.default.feed_forward."
    found = {}
    for name, x in model.base_model.model.state_dict().items():
        if inside in name:
            module, tensor = name.split(inside)
            part, _, tensor = tensor.rpartition(".")
            found.setdefault((module, part), {})[tensor] = x.detach()
    return found


def by_hand(model, tensors, placing):
    """Take our hooks away and add x Z_A Z_B to the parts in the plainest way; returns the tensors that count."""
    base = model.base_model.model
    blocks = feed_forwards(base, attention_of(base), placing)
    for module in base.modules():
        if hasattr(module, "ntk_states"):
            module.ntk_states.leave_block()
    leaves = {}
    for name, part in ((name, part) for name, block in blocks.items() for part in block.parts):
        own = tensors[name, part.size.name]
        leaf = leaves[name, part.size.name] = {n: x.clone().requires_grad_() for n, x in own.items()}
        seen = []
        part.first.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )

        def add(module, args, out, seen=seen, leaf=leaf):
            more = seen.pop() @ (leaf["Z_A"] @ leaf["Z_B"])
            return (out[0] + more, *out[1:]) if isinstance(out, tuple) else out + more

        part.last.register_forward_hook(add)
    return leaves


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_of(name):
    model = FAMILIES[name].build()
    blocks = feed_forwards(model, attention_of(model))
    assert len(blocks) == BLOCKS.get(name, 2)
    assert all(block.width == 32 for block in blocks.values())


EXPERTS = {"gpt_oss"}  # whose blocks have no linear layers of their own


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_are_the_linear_layers(name):
    """In the order of the block, with their sizes; all weights of the block are theirs."""
    model = FAMILIES[name].build()
    for block in feed_forwards(model, attention_of(model)).values():
        if name in EXPERTS:
            assert [part.size for part in block.parts] == [PartSize("", 32, 32)]
            continue
        assert [part.sees_hidden for part in block.parts] == [False] * (len(block.parts) - 1) + [True]
        weights = {w for module in {block.first, block.last} for w in module.parameters() if w.dim() == 2}
        assert weights == {part.first.weight for part in block.parts}
        for part in block.parts:
            assert sorted(part.first.weight.shape) == sorted([part.size.in_features, part.size.out_features])
            assert not hasattr(model, part.size.name)
    for block in feed_forwards(model, attention_of(model), "beside").values():
        assert [part.size for part in block.parts] == [PartSize("", 32, 32)]


class Squares(torch.nn.Module):
    """Linear layers whose sizes do not tell the last one."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(8, 8) for _ in range(3))


class Routed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up, self.down = torch.nn.Linear(8, 2), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)


class Packed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = torch.nn.ModuleList([torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)])
        self.experts = torch.nn.Parameter(torch.zeros(2, 8, 16))


def test_parts_of_odd_blocks():
    block = Squares()
    assert [part.sees_hidden for part in parts_inside(block, block, ("mlp", "mlp"), 8, "mlp")] == [False, False, True]
    for block in (Routed(), Packed()):
        assert parts_inside(block, block, ("mlp", "mlp"), 8, "mlp") == ()


@pytest.mark.parametrize("placing", ["inside", "beside"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_against_the_plain_sum(name, placing):
    """In float64; the parameters in coordinates of their own, so their gradients go through these."""
    family, model = float64(name, feed_forward=placing)
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        for part_name, prefix in layer["default"].parts.items():
            Z_A, Z_B = prefix.Z_A.detach().clone(), prefix.Z_B.detach().clone()
            sizes = (1 if layer.parts[part_name].sees_hidden else 2) * (len(Z_A),)
            prefix.set_coordinates(torch.randn(*sizes, generator=generator, dtype=torch.float64), 0.3)
            prefix.set_plain(Z_A, Z_B)
    inputs = family.inputs(padded=False)
    out = family.run(model, inputs)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    (out * weights).sum().backward()
    inside = ".ntk_states.default.feed_forward"
    own = [(n.split(inside), m) for n, m in model.base_model.model.named_modules() if isinstance(m, FeedForwardPrefix)]
    found = {(module, part.removeprefix(".")): (m, m.Z_A.grad, m.Z_B.grad) for (module, part), m in own}

    leaves = by_hand(model, plain(model), placing)
    expected = family.run(model, inputs)
    (expected * weights).sum().backward()
    assert relative_error(out, expected) < 1e-9
    assert found.keys() == leaves.keys()
    for place, (prefix, Z_A, Z_B) in found.items():
        C = prefix.coordinates if prefix.coordinates.dim() == 2 else prefix.coordinates.diag()
        assert relative_error(Z_A, C.mT @ leaves[place]["Z_A"].grad) < 1e-9
        assert relative_error(Z_B, prefix.unit * leaves[place]["Z_B"].grad) < 1e-9


def layers_of(model):
    return [module.ntk_states for module in model.modules() if hasattr(module, "ntk_states")]


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_oss", "bert"])
@torch.no_grad()
def test_nothing_is_left_behind(name):
    family = FAMILIES[name]
    base, inputs = family.build(), family.inputs()
    expected = family.run(base, inputs)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules())
    model = get_peft_model(base, NTKAttentionConfig(init_weights=False), autocast_adapter_dtype=False)
    assert not torch.allclose(family.run(model, inputs), expected)
    with model.disable_adapter():
        assert torch.equal(family.run(model, inputs), expected)
    base = model.unload()
    assert torch.equal(family.run(base, inputs), expected)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == hooks


def test_start_has_no_effect_and_white_inputs():
    """Calibrated on one batch alone: the mean square of every direction of the inputs is the same, of hidden
    activations that of every one, and units are those of the median real token."""
    model = adapted(init_weights=True, feed_forward_rank=16)
    seen, sizes = {}, {}
    mlp = model.base_model.model.model.layers[1].mlp
    with model.disable_adapter(), torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            module = getattr(mlp, name)
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.update({f"{name}_part": (args[0], out)})
            )
        model(**INPUTS)
    calibrate(model, [INPUTS], others=False)
    parts, real = adapters(model)[1].parts, INPUTS["attention_mask"].bool()
    for name, (x, out) in seen.items():
        part = parts[name]
        size = out[real].square().mean(dim=1).sqrt().median().item()
        assert part.unit == pytest.approx(DEFAULT.output_step * size * part.rank**-0.5, rel=1e-5)
        assert (x[real] @ part.plain_leading()).square().mean().item() == pytest.approx(1.0, rel=0.6)
        assert not part.Z_B.any()
        step = DEFAULT.input_step / x.shape[-1]
        if name == "down_proj_part":
            white = x[real] * part.coordinates / step
            square = white.square().mean(dim=0)
            square = square[square > 0.999 * square.max()]  # the rest is under the floor
            assert len(square) > 1
        else:
            white = (x[real] @ part.coordinates).double() / step
            square = torch.linalg.eigvalsh(white.mT @ white / len(white))[-min(white.shape) // 2 :]
            sizes[name] = part.coordinates.data_ptr()
        torch.testing.assert_close(square, torch.ones_like(square), rtol=1e-3, atol=0)
    assert len(set(sizes.values())) == 1  # held once
    again = adapted(init_weights=True, feed_forward_rank=16)
    calibrate(again, [INPUTS], others=False)
    for name, part in adapters(again)[1].parts.items():  # the same start in every process
        assert torch.equal(part.Z_A, parts[name].Z_A)


@pytest.mark.parametrize("name", FAMILIES)
def test_unit_of_every_family(name):
    """Of what the module of a part returns: by hooks."""
    family = FAMILIES[name]
    model = get_peft_model(family.build(), NTKAttentionConfig(feed_forward_rank=3), autocast_adapter_dtype=False).eval()
    layers = [layer for layer in layers_of(model) if layer["default"].parts]
    assert len(layers) == BLOCKS.get(name, 2)
    inputs = family.inputs(padded=False)
    calibrate(model, [inputs], others=False)
    sizes = {}

    def keep(module, args, out, place):
        out = (out if torch.is_tensor(out) else out[0]).flatten(0, -2)
        sizes.setdefault(place, []).append(out.square().mean(dim=1).sqrt())

    for i, layer in enumerate(layers):
        for part in layer.parts.values():
            part.last.register_forward_hook(partial(keep, place=(i, part.size.name)))
    with model.disable_adapter(), torch.no_grad():
        family.run(model, inputs)
    for (i, part_name), found in sizes.items():
        expected = DEFAULT.output_step * torch.cat(found).median().item() * 3**-0.5
        assert layers[i]["default"].parts[part_name].unit == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype, out_dtype):
    """The sum keeps the dtype of the block's output, which autocast may make another than that of its input."""
    prefix = FeedForwardPrefix(16, 24, 3)
    prefix.reset_parameters(visible=True)
    prefix.set_coordinates(None, 0.5)
    x, out = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 5, 24, dtype=out_dtype)
    expected = out.double() + x.double() @ prefix.Z_A.double() @ (0.5 * prefix.Z_B.double())
    actual = prefix(x, out)
    assert actual.dtype == out_dtype
    assert relative_error(actual, expected) < (1e-6 if dtype == out_dtype == torch.float32 else 1e-2)


def test_training_moves_it_and_files_hold_it(tmp_path):
    model = adapted(init_weights=True).train()
    calibrate(model, [INPUTS])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    model.eval()
    assert all(part.Z_B.any() for adapter in adapters(model) for part in adapter.parts.values())
    model.save_pretrained(tmp_path)
    names = {name.split("ntk_states.")[1] for name in load_file(tmp_path / WEIGHTS)}
    parts = {f"feed_forward.{name}_proj_part.{Z}" for name in ("gate", "up", "down") for Z in ("Z_A", "Z_B")}
    assert names == {"Z_A", "Z_B", "log_k", "log_scale"} | parts
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    assert relative_error(logits(loaded), logits(model)) < 1e-5


def test_two_active_adapters_against_their_sum():
    model = adapted(adapter_name="first")
    model.add_adapter("second", NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM", feed_forward_rank=3))
    model.base_model.set_adapter(["first", "second"])
    expected = logits(model)
    model.base_model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both")
    assert model.peft_config["both"].feed_forward_rank == model.peft_config["first"].feed_forward_rank + 3
    model.set_adapter("both")
    assert relative_error(logits(model), expected) < 1e-4
    model.base_model.add_weighted_adapter(["first", "second"], [2.0, 0.0], "twice")
    first, twice = (adapters(model, name)[0].parts["up_proj_part"] for name in ("first", "twice"))
    assert relative_error(twice.Z_A @ twice.Z_B, 2 * first.Z_A @ first.Z_B) < 1e-6
    beside = NTKAttentionConfig(init_weights=False, task_type="CAUSAL_LM", feed_forward="beside")
    model.add_adapter("beside", beside)
    with pytest.raises(ValueError, match="inside of feed-forward blocks and beside them"):
        model.base_model.add_weighted_adapter(["first", "beside"], [1.0, 1.0], "neither")


def test_rows_with_and_without():
    """Rows of one batch whose adapters have blocks of other ranks, in other places, or none."""
    model = adapted(adapter_name="first")
    options = {"init_weights": False, "task_type": "CAUSAL_LM"}
    model.add_adapter("second", NTKAttentionConfig(**options, feed_forward_rank=5))
    model.add_adapter("third", NTKAttentionConfig(**options, feed_forward_rank=None))
    model.add_adapter("fourth", NTKAttentionConfig(**options, feed_forward="beside"))
    names = ["third", "second", "__base__", "first", "fourth"]
    inputs = {name: x[:1].expand(5, -1) for name, x in TINY.inputs(torch.float32).items()}
    with torch.no_grad():
        actual = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            one = {n: x[row : row + 1] for n, x in inputs.items()}
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(**one).logits
            else:
                model.set_adapter(name)
                expected = model(**one).logits
            assert relative_error(actual[row], expected[0]) < 1e-5


def test_rows_whose_output_is_flat():
    """The experts of Llama 4 take [B, L, D] and return [B L, D]."""
    block = FeedForwardPrefix(6, 6, 2)
    block.reset_parameters(visible=True)
    rows = FeedForwardRows.stack([block], torch.tensor([0, -1], dtype=torch.int32))
    x, out = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    with torch.no_grad():
        assert torch.equal(rows(x, out.flatten(0, 1)), rows(x, out).flatten(0, 1))


def test_a_block_that_is_saved_whole_is_refused():
    with pytest.raises(ValueError, match=r"overlaps model\.layers\.0\.mlp"):
        adapted(modules_to_save=["layers.0.mlp.up_proj"])


def test_solve_by_qr_with_several_threads():
    """At a size where torch's LU of a batch goes wrong."""
    generator = torch.Generator().manual_seed(0)
    A, X = (torch.randn(4, 257, n, dtype=torch.float64, generator=generator) for n in (257, 3))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert relative_error(solve_by_qr(A, A @ X), X) < 1e-9
    finally:
        torch.set_num_threads(threads)
