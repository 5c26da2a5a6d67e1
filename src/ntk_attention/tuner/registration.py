"""What PEFT has no hook for: NTK_ATTENTION as a member of its closed enum of methods, and a word when it saves."""

import enum
from collections.abc import Callable
from functools import wraps
from typing import Any

from peft import PeftModel
from peft.utils import PeftType

NAME = "NTK_ATTENTION"


def extend_enum(cls: type[enum.Enum], name: str, value: str) -> Any:
    """Add a member to a str enum, once; what `class` would have done had it stood there."""
    if name in cls.__members__:
        return cls[name]
    member = str.__new__(cls, value)  # type: ignore[type-var]
    member._name_, member._value_ = name, value
    type.__setattr__(cls, name, member)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[value] = member
    return member


PEFT_TYPE = extend_enum(PeftType, NAME, NAME)


def check_own_config(model: PeftModel) -> None:
    """Raise ValueError where the config of an adapter of ours was replaced by another method's of the same name: PEFT
    would save that one alone."""
    layers = [module for module in model.modules() if type(module).__name__ == "NTKAttentionLayer"]
    for name, config in model.peft_config.items():
        if config.peft_type != PEFT_TYPE and any(name in layer.adapters for layer in layers):
            raise ValueError(
                f"{name!r} is the name of an NTK-Attention adapter and of a later one of {config.peft_type.value}, "
                "which would be saved in its place: inject that one under another name"
            )


def refuse_pickles(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    """`PeftModel.save_pretrained`, which asks no method, but for adapters of ours in the format that we cannot read."""

    @wraps(save_pretrained)
    def save(self: PeftModel, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any) -> None:
        if not safe_serialization and any(config.peft_type == PEFT_TYPE for config in self.peft_config.values()):
            raise ValueError(
                "safe_serialization=False writes a pickle, which may run code when it is read: NTK-Attention adapters "
                "are saved as safetensors"
            )
        check_own_config(self)
        save_pretrained(self, save_directory, safe_serialization, *args, **kwargs)

    return save


PeftModel.save_pretrained = refuse_pickles(PeftModel.save_pretrained)
