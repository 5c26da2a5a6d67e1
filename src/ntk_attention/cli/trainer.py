"""A Trainer that loses nothing: checkpoints that are whole, the same run after a resume, and a stop where it breaks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..tuner.coordinates import Coordinated
from ..tuner.distributed import bring_with, gathered, local, whole
from ..tuner.observation import adapted_layers
from .evaluation import mean_loss
from .run_folder import STAGING, is_whole, last_good_checkpoint, move, seal, step_of

TRAINED = "trained.safetensors"  # of a checkpoint: the parameters as they are trained, in their coordinates
KEPT_CHECKPOINTS = 2


class AdapterTrainer(Trainer):
    """`Trainer`, with checkpoints that hold the trained parameters exactly and appear whole or not at all.

    It runs under `accelerate launch` as `Trainer` does: DDP, and FSDP2 and DeepSpeed's ZeRO-3, whose sharded parameters
    are put together for every file.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, pad_token_id: int, **kwargs: Any):
        args._n_gpu = min(args.n_gpu, 1)  # with more, `Trainer` would copy the model to each and enlarge the batch
        super().__init__(model, args, **kwargs)
        self.pad_token_id = pad_token_id
        if self.is_deepspeed_enabled:
            for layer in adapted_layers(self.model).values():
                bring_with(layer.get_base_layer(), layer.parameters())

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from the start or from a checkpoint.

        From the checkpoint of the last step, in the middle of an epoch or where it stopped early, `Trainer` would make
        one step more. Where a best checkpoint is looked for, the end is that one.
        """
        if checkpoint is None or not self.is_last(checkpoint):
            # On a GPU autograd has a thread of its own, where our Python takes longer: `python -m research bench host`.
            with torch.autograd.set_multithreading_enabled(False):
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.args.metric_for_best_model is not None and self.state.best_global_step:
            best = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if not is_whole(best):
                raise ValueError(f"the best checkpoint, {best}, is not there or damaged: use --overwrite")
            self._load_from_checkpoint(str(best))

    def is_last(self, checkpoint: Path) -> bool:
        """Whether the run made no step after this checkpoint."""
        callbacks = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).stateful_callbacks or {}
        stopped = any(
            callback["attributes"]["early_stopping_patience_counter"] >= callback["args"]["early_stopping_patience"]
            for name, callback in dict(callbacks).items()
            if name == EarlyStoppingCallback.__name__
        )
        return stopped or step_of(checkpoint) >= self.args.max_steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoints = Path(self.args.output_dir)
        staging = checkpoints / STAGING
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with replaced(self.args, "output_dir", str(staging)):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            trained = exact_tensors(self.model)
            if self.accelerator.is_main_process:
                save_file(trained, staging / name / TRAINED)
                seal(staging / name)
                shutil.rmtree(checkpoints / name, ignore_errors=True)  # one that was there and not whole
                move(staging / name, checkpoints / name)
                self._forget_older(checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
            shutil.rmtree(staging, ignore_errors=True)
            raise ValueError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {checkpoints}: {error}; "
                f"{self._where_to_resume()}"
            ) from error
        self.accelerator.wait_for_everyone()

    def _forget_older(self, checkpoints: Path) -> None:
        found = sorted(checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step_of)
        for checkpoint in found[:-KEPT_CHECKPOINTS]:
            if self.args.metric_for_best_model is not None and step_of(checkpoint) == self.state.best_global_step:
                continue
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_exact_tensors(self.model if model is None else model, load_file(Path(resume_from_checkpoint, TRAINED)))

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        gradients = {name: local(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        norms = list(torch._foreach_norm(list(gradients.values()))) if gradients else []
        # FSDP2 may keep gradients in the memory of the CPU.
        found = [loss.detach().float(), *(norm.to(loss.device, torch.float32) for norm in norms)]
        if self.is_deepspeed_enabled:  # which keeps the gradients, and has made its step already
            norm = self.model_wrapped.get_global_grad_norm()
            found += [] if norm is None else [torch.as_tensor(norm).to(loss.device, torch.float32)]
        bad = (~torch.stack(found).isfinite()).sum()
        bad_loss = self.accelerator.reduce((~loss.detach().isfinite()).float())
        if self.accelerator.reduce(bad.float()) > 0:  # all processes stop, whoever saw it
            broken = [name for name, norm in zip(gradients, norms, strict=True) if not norm.isfinite()]
            raise ValueError(
                f"the {'loss' if bad_loss > 0 else 'gradient'} is not finite at step {self.state.global_step + 1}: "
                f"{self._first_broken(inputs, broken)}; lower the learning rate ({self.args.learning_rate}); "
                f"{self._where_to_resume()}"
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss of every validation token alike; each process computes it, so that it is the same for any number."""
        metrics = {"eval_loss": mean_loss(self.model, self.eval_dataset, self.pad_token_id)}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _where_to_resume(self) -> str:
        checkpoint = last_good_checkpoint(Path(self.args.output_dir))
        if checkpoint is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {checkpoint} (--resume goes on from it)"

    def _first_broken(self, inputs: dict[str, Any], gradients: list[str]) -> str:
        name = first_broken_module(self.model, self._prepare_inputs(inputs))
        if name is not None:
            return f"{name} is the first module that makes numbers that are not finite"
        return f"the last layer with such a gradient has it in {gradients[-1]}" if gradients else "in the loss alone"


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value for a while."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def exact_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as they are, in the coordinates of calibration; all processes must ask together."""
    return {
        f"{name}.{tensor}": whole(parameter).detach().cpu().contiguous()
        for name, layer in adapted_layers(model).items()
        for tensor, parameter in layer["default"].saved_tensors().items()
    }


@torch.no_grad()
def load_exact_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, layer in adapted_layers(model).items():
        for tensor, parameter in layer["default"].saved_tensors().items():
            value = tensors[f"{name}.{tensor}"].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            with gathered([parameter]):
                parameter.copy_(value)


def calibration_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The start of a run, coordinates included: what a resumed run must not compute anew."""
    tensors, before = exact_tensors(model), None
    for name, module in coordinated(model).items():
        C = module.coordinates
        assert C is not None
        same = before is not None and C.shape == before.shape and C.data_ptr() == before.data_ptr()
        # Empty: those of the part before, which sees the same inputs.
        tensors[f"{name}.coordinates"] = torch.empty(0) if same else C.cpu().contiguous()
        tensors[f"{name}.unit"] = torch.tensor(module.unit, dtype=torch.float64)
        before = C
    return tensors


def set_calibration(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    before = None
    for name, module in coordinated(model).items():
        own = tensors[f"{name}.coordinates"]
        module.set_coordinates(own if own.numel() else before, tensors[f"{name}.unit"].item())
        before = module.coordinates
    load_exact_tensors(model, tensors)


def coordinated(model: nn.Module) -> dict[str, Coordinated]:
    """Every part of the adapter that has coordinates."""
    return {
        f"{name}.{inner}": module
        for name, layer in adapted_layers(model).items()
        for inner, module in layer["default"].named_modules()
        if isinstance(module, Coordinated)
    }


def save_calibration(model: nn.Module, path: Path) -> None:
    part = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(exist_ok=True)
    save_file(calibration_tensors(model), part)
    move(part, path)


def load_calibration(model: nn.Module, path: Path) -> None:
    try:
        set_calibration(model, load_file(path))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): use --overwrite") from None


def share_calibration(model: nn.Module, state: PartialState) -> None:
    """Every process takes the start of the first one."""
    if state.num_processes > 1:
        tensors = send_to_device(calibration_tensors(model), state.device)
        set_calibration(model, broadcast(tensors))


@torch.no_grad()
def first_broken_module(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """The innermost module, and the first, that gets finite numbers and makes others of them."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not found and is_finite((args, kwargs)) and not is_finite(output):
            found.append(name)

    handles = [
        module.register_forward_hook(partial(look, name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def is_finite(value: Any) -> bool:
    """Of all floating tensors in it; the masks of attention, which may hold -inf, count as finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or not (value.isnan() | (value == torch.inf)).any().item()
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return True
