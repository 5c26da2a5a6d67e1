"""A base model whose heads are spread over two processes, against one process: start, training, files.

On two GPUs where there are as many (NCCL), else on the CPU (gloo).
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from ntk_attention import calibrate
from ntk_attention.tuner import plan
from ntk_attention.tuner.calls import exact_prefix
from ntk_attention.tuner.distributed import whole
from ntk_attention.tuner.observation import adapted_layers
from tests.reference import relative_error
from tests.tiny import INPUTS, adapted, adapters, logits, loss_of, tiny, trainable

pytestmark = pytest.mark.slow

OPTIONS = {
    "query": {},
    "kv": {"state_heads": "kv"},
    "rank": {"rank": 2},
    "taylor": {"feature_map": "taylor"},  # the only one with k_signed
    "random": {"feature_map": "positive_random", "state_heads": "kv"},
    "rotary": {"positions": "rotary"},
    "beside": {"feed_forward": "beside"},
}
ON_GPUS = torch.cuda.device_count() >= 2
# What whitening makes of rounding in three large steps is up to 2e-4 of the losses and logits on a CPU. A GPU sums in
# yet another order.
VALUE, FILE = (3e-3, 1e-3) if ON_GPUS else (1e-3, 1e-4)


def load(model_folder, processes):
    if processes > 1:
        config = DistributedConfig(tp_size=processes)
        return AutoModelForCausalLM.from_pretrained(model_folder, distributed_config=config)
    return AutoModelForCausalLM.from_pretrained(model_folder).to("cuda" if ON_GPUS else "cpu")


def inputs_of(model):
    return {name: x.to(model.device) for name, x in INPUTS.items()}


def outputs(model):
    return logits(model, inputs_of(model)).cpu()


def train(model, steps=3):
    # With a small eps the first steps are signs, also of gradients that are nothing but rounding.
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.2, eps=0.1)
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs_of(model))
        loss.backward()
        norms.append(whole(torch.nn.utils.clip_grad_norm_(trainable(model).values(), 0.5)).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def use(name, model_folder, folder, processes, rank):
    """What a user does with an adapter."""
    model = adapted(load(model_folder, processes), init_weights=True, **OPTIONS[name])
    calibrate(model, [INPUTS])
    found = {"start": outputs(model)}
    found["losses"], found["norms"] = train(model)
    found["logits"] = outputs(model)
    found["tokens"] = model.generate(**inputs_of(model), max_new_tokens=3, do_sample=False).cpu()
    found["heads"] = adapters(model)[0].num_heads
    found["trainable"] = model.get_nb_trainable_parameters()[0]
    model.load_state_dict(model.state_dict())  # whole and in plain coordinates, and back
    found["reloaded"] = outputs(model)
    model.save_pretrained(folder / name, is_main_process=rank == 0)
    if processes > 1:
        dist.barrier()
    for low in (False, True):
        loaded = PeftModel.from_pretrained(load(model_folder, processes), folder / name, low_cpu_mem_usage=low)
        found[f"loaded, low_cpu_mem_usage={low}"] = outputs(loaded)
    rows = adapted(load(model_folder, processes), **OPTIONS[name]).eval()
    inputs, last = inputs_of(rows), ["__base__"] * (len(INPUTS["input_ids"]) - 1)
    with torch.no_grad():
        found["rows"] = rows(**inputs, adapter_names=["default", *last]).logits.cpu()
    random = adapted(load(model_folder, processes), **OPTIONS[name])
    states = random.base_model.model.model.layers[0].self_attn.ntk_states
    found["random"] = [whole(p).cpu() for p in states.parameters()]
    return found


def one_of_two(rank, model_folder, folder):
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # by which transformers chooses the GPU
    if ON_GPUS:
        torch.cuda.set_device(rank)
    backend = "nccl" if ON_GPUS else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {name: use(name, model_folder, folder, 2, rank) for name in OPTIONS}
    layers = adapted_layers(adapted(load(model_folder, 2)))
    with pytest.raises(ValueError, match="tp_size=1"), exact_prefix(layers, {}):
        pass
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(model_folder, tmp_path_factory) -> Path:
    if torch.cuda.device_count() == 1:
        pytest.skip("transformers spreads over GPUs where there is one, and here is one for two processes")
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(one_of_two, (model_folder, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_against_one(name, model_folder, two, tmp_path):
    expected = use(name, model_folder, tmp_path, 1, 0)
    for rank in range(2):
        found = torch.load(two / f"{rank}.pt")[name]
        assert 2 * found.pop("heads") == expected["heads"]
        assert found.pop("trainable") == expected["trainable"]
        assert torch.equal(found.pop("tokens"), expected["tokens"])
        for part, value in found.items():
            torch.testing.assert_close(value, expected[part], rtol=VALUE, atol=VALUE, msg=lambda m, p=part: f"{p}: {m}")
    files = [load_file(folder / name / "adapter_model.safetensors") for folder in (two, tmp_path)]
    assert files[0].keys() == files[1].keys()
    for tensor, x in files[0].items():
        assert x.shape == files[1][tensor].shape
        assert relative_error(x, files[1][tensor]) < FILE
    loaded = PeftModel.from_pretrained(load(model_folder, 1), two / name)
    assert relative_error(outputs(loaded), expected["logits"]) < VALUE
    assert relative_error(expected["logits"], outputs(load(model_folder, 1))) > 1e-2


def test_other_sharding_beside_it_is_refused():
    class TwoByTwo:
        mesh_dim_names, shape = ("fsdp", "tp"), (2, 2)

        def size(self):
            return 4

    base = tiny()
    base._device_mesh, base._tp_size, base.tp_plan = TwoByTwo(), 2, {"model.layers.*.self_attn.o_proj": "rowwise"}
    with pytest.raises(ValueError, match=r"expected tensor parallelism alone, got \{'fsdp': 2, 'tp': 2\}"):
        adapted(base)


def spread_over(monkeypatch, processes):
    """A base model that is taken for one that so many processes hold."""
    mesh = SimpleNamespace(size=lambda: processes)
    monkeypatch.setattr(plan, "head_mesh", lambda model, name: mesh)
    return tiny()


def test_packed_layers_of_a_block_are_refused(monkeypatch):
    base = spread_over(monkeypatch, 2)
    base.tp_plan = {"model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(ValueError, match=r"mlp\.up_proj is spread over processes in the style 'packed_colwise'"):
        adapted(base)


def test_heads_that_do_not_divide_are_refused(monkeypatch):
    base = spread_over(monkeypatch, 3)
    with pytest.raises(ValueError, match="has 4 heads and 2 KV heads: expected multiples of tp_size = 3"):
        adapted(base)
    assert not any("ntk_states" in name for name in base.state_dict())
