"""Sizes and ids of a model, wherever in its nested config they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

SIGNAL_TOKENS = tuple(
    f"{kind}_token_{end}"
    for kind in ("image", "video", "audio", "vision", "vision_start", "vision_end", "speech")
    for end in ("id", "index")
)


class Settings:
    """Looks names up in a config and in those inside it, the outer ones first."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.configs = list(walk(config))

    def get(self, *names: str, default: Any = None) -> Any:
        return look_up(self.configs, names, default)

    def of(self, *parts: str, names: tuple[str, ...], default: Any = None) -> Any:
        """In those of the inner configs whose attribute holds one of the parts; in all where there is none."""
        inner = [
            value
            for config in self.configs
            for attribute, value in vars(config).items()
            if isinstance(value, PreTrainedConfig) and any(part in attribute for part in parts)
        ]
        found = look_up([c for config in inner for c in walk(config)], names, None)
        return self.get(*names, default=default) if found is None else found

    def text(self, *names: str, default: Any = None) -> Any:
        return look_up([self.config.get_text_config(), *self.configs], names, default)

    def vision(self, *names: str, default: Any = None) -> Any:
        return self.of("vision", "vit", "visual", "image", "backbone", names=names, default=default)

    def audio(self, *names: str, default: Any = None) -> Any:
        return self.of("audio", "encoder", "speech", names=names, default=default)

    def places(self, size: int) -> set[int]:
        """Tokens of a vocabulary of this size that stand for signals, and those around them."""
        names = [(n, v) for config in self.configs for n, v in vars(config).items() if n.endswith(SIGNAL_TOKENS)]
        return {value for _, value in names if isinstance(value, int) and 0 <= value < size}

    def token(self, *names: str) -> int | None:
        found = self.get(*names)
        return found[0] if isinstance(found, list) else found


def walk(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Breadth first."""
    level = [config]
    while level:
        yield from level
        level = [v for c in level for v in vars(c).values() if isinstance(v, PreTrainedConfig)]


def look_up(configs: list[PreTrainedConfig], names: tuple[str, ...], default: Any) -> Any:
    for config in configs:
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return default
