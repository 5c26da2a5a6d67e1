"""What the launches use of Triton without a promise: that a descriptor filled by hand is one that Triton makes, and how
a compiled kernel is run.

`launcher.py` and `launch.py` go around the constructors of tensor descriptors, whose checks cost more than a short
kernel, `launcher.py` runs a compiled kernel as Triton's own `JITFunction.run` does, and `forward_sm90.py` takes names
of Gluon, which is experimental. When one of these tests fails, Triton has changed, and its message names the place to
change. They need no GPU.
"""

import dataclasses
import importlib
import inspect

import pytest
import torch
from triton.runtime.jit import JITFunction

from ntk_attention.ops.triton import decoder, launch, launcher, tiles

pytestmark = pytest.mark.skipif(launch.triton is None, reason="needs Triton")
BLOCK = (1, 1, 16, 64)


def x() -> torch.Tensor:
    return torch.zeros(1, 2, 32, 64, dtype=torch.bfloat16)


def gluon():
    """The module of the kernel for Hopper, imported so that a name that is gone is seen."""
    try:
        return importlib.import_module("ntk_attention.ops.triton.forward_sm90")
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Triton {launch.triton.__version__} lacks a name that forward_sm90.py uses: {error}")


def compare(ours, theirs, place):
    """Every attribute that Triton's constructor leaves is there in ours, and equal."""
    version = f"Triton {launch.triton.__version__}"
    kind = type(theirs)
    assert hasattr(theirs, "__dict__"), f"{version}: {kind} has slots, {place} fills __dict__"
    assert type(ours) is kind
    fields = {f.name for f in dataclasses.fields(theirs)} if dataclasses.is_dataclass(theirs) else set()
    for name in sorted(fields | set(vars(theirs))):
        assert hasattr(ours, name), f"{version}: its constructor of {kind} makes {name!r}, {place} does not"
        mine, given = getattr(ours, name), getattr(theirs, name)
        same = mine is given if name == "base" else mine == given
        assert same, f"{version}: {name} of {kind} is {given!r}, {place} makes {mine!r}"
    unknown = set(vars(ours)) - set(vars(theirs))
    assert not unknown, f"{version}: {kind} has no {sorted(unknown)}, which {place} fills"


def test_descriptor():
    tensor = x()
    theirs = launcher.TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(BLOCK))
    compare(launcher.descriptor(tensor, 16, 64), theirs, "launcher.descriptor")


def test_gluon_descriptor():
    module, tensor = gluon(), x()
    layout = module.shared_layout(BLOCK)
    theirs = module.TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(BLOCK), layout)
    compare(launch.gluon_descriptor(tensor, BLOCK), theirs, "launch.gluon_descriptor")


def test_run_of_a_compiled_kernel():
    """`launcher.py` hands a compiled kernel the arguments that Triton does, and takes the same attributes of it."""
    source = "".join(inspect.getsource(JITFunction.run).split())
    expected = (
        "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
        "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
    )
    version = f"Triton {launch.triton.__version__}"
    assert expected in source, f"{version}: JITFunction.run runs a compiled kernel otherwise than launcher.Launcher"
    assert source.endswith("returnkernel"), f"{version}: JITFunction.run does not return what it has run"
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream") if torch.version.cuda else ():
        assert hasattr(torch._C, name), f"torch {torch.__version__} lacks torch._C.{name}, which launcher.py calls"


@pytest.mark.parametrize("name", ["forward", "merge", "decode", "backward", "random_backward", "random_query"])
def test_numbers_and_vectors_are_never_special(name):
    """What a launch finds by its types and constants must not depend on values: else it would run a wrong kernel."""
    parameters = inspect.signature(
        getattr(decoder if name == "decode" else launch, f"{name}_kernel").kernel.fn
    ).parameters.values()
    found = {p.name: "constexpr" not in str(p.annotation) for p in parameters}
    unknown = {
        name
        for name, is_given in found.items()
        if is_given and name not in tiles.SIZES | tiles.VECTORS and not name.startswith("stride")
    }
    assert all(name[0].isupper() for name in unknown), f"numbers of no known kind: {unknown}"


def test_kernels_are_told_so():
    """`decorated` names the parameters that Triton must not look at."""
    told = {}
    tiles.decorated(lambda kernel, **options: told.update(options), decoder.decode_kernel.kernel.fn)
    assert {"L", "S", "scale", "stride_qb", "stride_t"} <= set(told["do_not_specialize"])
    assert {"k_state", "b_state", "Index", "Mask"} == set(told["do_not_specialize_on_alignment"])


def test_gluon_names():
    """Names that another version may lack would switch the kernel off without a word: `launch.py` does without it."""
    assert launch.forward_sm90 is gluon()


def test_a_change_is_seen():
    """A field more, a value that is another, a field less: the comparison must not pass by itself."""
    tensor = x()
    theirs = launcher.TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(BLOCK))
    for change, message in (
        ({"origin": 0}, "makes 'origin', the test does not"),
        ({"block_shape": [1, 1, 32, 64]}, "block_shape of .* is .*32"),
    ):
        changed = launcher.TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(BLOCK))
        changed.__dict__.update(change)
        with pytest.raises(AssertionError, match=message):
            compare(launcher.descriptor(tensor, 16, 64), changed, "the test")
    ours = launcher.descriptor(tensor, 16, 64)
    ours.__dict__["gone"] = 0
    with pytest.raises(AssertionError, match=r"has no \['gone'\]"):
        compare(ours, theirs, "the test")
