"""Make NTK_ATTENTION a member of PEFT's closed enum of methods, which has no hook for other packages."""

import enum
from typing import Any

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
