"""Everything that a fine-tuning run depends on, checked before any work."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .evaluation import MAX_NEW_TOKENS
from .models import DTYPES

SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # names of transformers
ADAPTER = ("feature_map", "rank", "state_heads", "positions")  # options of NTKAttentionConfig
TOO_LONG = ("refuse", "drop", "cut")


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on; what None stands for is said where the command line names the option."""

    model: str
    data: str
    items: int | None = None
    held_out: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    learning_rate: float = 3e-3
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0
    adapter: dict[str, Any] = field(default_factory=dict)  # options of NTKAttentionConfig
    eval_data: str | None = None
    streaming: bool = False
    max_length: int | None = None
    too_long: str = "refuse"
    packing: bool = False
    gradient_accumulation: int = 1
    dtype: str = "auto"
    load_in_4bit: bool = False
    scheduler: str = "linear"
    warmup: float | None = None
    save_best: bool = False
    patience: int | None = None
    report_to: str | None = None
    push_to_hub: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("items", "held_out", "max_length", "patience") if getattr(self, name) is not None]
        check_numbers(self, whole=("batch_size", "max_new_tokens", "gradient_accumulation", *given))
        check_numbers(self, positive=("epochs", "learning_rate"))
        check_seed(self.seed)
        for name, known in (("too_long", TOO_LONG), ("scheduler", tuple(SCHEDULERS)), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        warmup = 0 if self.warmup is None else self.warmup
        if not 0 <= warmup < math.inf or (warmup > 1 and warmup % 1):
            raise ValueError(f"warmup must be a number of steps, or below 1 a share of them, got {self.warmup}")
        if self.packing and self.max_length is None:
            raise ValueError("packing fills rows of max_length tokens: say how many")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter is that of the lowest validation loss, not the last one."""
        return self.save_best or self.patience is not None

    def options(self) -> dict[str, Any]:
        """The options of the command line that stand for these settings."""
        values = asdict(self)
        adapter = {name: value for name, value in values.pop("adapter").items() if value != "auto"}
        return {**values, **adapter}


def from_options(options: Mapping[str, Any]) -> Settings:
    """The settings that options of the command line stand for."""
    adapter = {name: options[name] for name in ADAPTER}
    adapter["rank"] = "auto" if adapter["rank"] is None else adapter["rank"]
    names = [f.name for f in fields(Settings) if f.name != "adapter"]
    return Settings(**{name: options[name] for name in names}, adapter=adapter)


def check_numbers(settings: Any, whole: Sequence[str] = (), positive: Sequence[str] = ()) -> None:
    """Raise ValueError unless these settings are positive and finite, and the first ones whole numbers."""
    for name in (*whole, *positive):
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
        if name in whole and not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, got {value}")


def check_seed(seed: int) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2^32 - 1, got {seed}")
