"""Pictures, sound and other signals in the shapes that models want them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .settings import Settings

Offer = dict[str, Any]
GRID = 4  # patches on a side, where a picture comes as patches
FRAMES = 4
MOST_FRAMES = 2000  # of a spectrum, halved
SAMPLES = 4000  # of raw sound
LARGEST = 512  # side of a picture: larger ones take too long


@dataclass(frozen=True)
class Signal:
    """An argument of forward, and the tower that it is for."""

    name: str
    kind: str
    offer: Callable[[Settings, set[str], int], Iterator[Offer]]


def offers(signal: Signal, settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """Values for the signal and all that must come with it, the likeliest first."""
    for offer in signal.offer(settings, names, batch):
        renamed = {signal.name if name == "signal" else name: value for name, value in offer.items()}
        yield {name: value for name, value in renamed.items() if name == signal.name or name in names}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def side(value: Any) -> int | None:
    """The side of a square, however a config writes it."""
    if isinstance(value, dict):
        value = value.get("height", value.get("shortest_edge", next(iter(value.values()), None)))
    if isinstance(value, list | tuple):
        value = value[-1] if value else None
    return value if isinstance(value, int) else None


def picture_sizes(settings: Settings) -> tuple[int, int, int]:
    """Channels, side and side of a patch."""
    patch = side(settings.vision("patch_size")) or 8
    published = side(settings.vision("image_size", "img_size", "input_size"))
    published = None if published and published > LARGEST else published
    channels = settings.vision("num_channels", "in_channels", "in_chans", "num_image_channels", default=3)
    return channels if isinstance(channels, int) else 3, published or 4 * max(patch, 8), patch


def pictures(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    C, S, p = picture_sizes(settings)
    beside = beside_pictures(settings, batch, S)
    t = settings.vision("temporal_patch_size", default=1)
    grids = [name for name in names if "grid" in name and "video" not in name]
    if grids:
        grid = torch.tensor([[1, GRID, GRID]]).expand(batch, -1).contiguous()
        flat = noise(batch * GRID * GRID, C * t * p * p)
        frames = flat.view(-1, C, p, p) if t == 1 else flat.view(-1, C, t, p, p)
        for values in (flat, frames, flat[None], flat.view(batch, GRID * GRID, -1)):
            yield {**beside, "signal": values, **dict.fromkeys(grids, grid)}
    patches = noise(batch, GRID * GRID, C * p * p)
    where = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="xy"), -1).view(-1, 2)
    if names & {"spatial_shapes", "image_position_ids", "pixel_position_ids", "tgt_sizes", "target_sizes"}:
        shapes = torch.tensor([[GRID, GRID]]).expand(batch, -1).contiguous()
        together = {
            "pixel_attention_mask": torch.ones(batch, GRID * GRID, dtype=torch.long),
            "spatial_shapes": shapes,
            "tgt_sizes": shapes,
            "target_sizes": shapes,
            "image_position_ids": where.expand(batch, -1, -1).contiguous(),
            "pixel_position_ids": where.expand(batch, -1, -1).contiguous(),
        }
        yield {**beside, **together, "signal": patches}
        yield {**beside, **together, "signal": noise(1, C, p, batch * GRID * GRID * p)}
    for shape in ((C, S, S), (1, C, S, S), (FRAMES, C, S, S), (2, C, S, S), (1, 1, C, S, S), (1, 4, C, S, S)):
        yield {**beside, "signal": noise(batch, *shape)}
        if "image_sizes" in names:
            yield {"signal": noise(batch, *shape)}
        if len(shape) == 5:
            tiles = settings.vision("max_num_tiles", default=shape[1])
            mask = torch.zeros(batch, 1, tiles, dtype=torch.long)
            mask[..., 0] = 1
            aspects = {"aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long), "aspect_ratio_mask": mask}
            yield {**beside, **aspects, "signal": noise(batch, 1, tiles, *shape[2:])}
    for other in (32, 64, 224):
        if other < S or settings.vision("image_size", "img_size") is None:
            yield {**beside_pictures(settings, batch, other), "signal": noise(batch, C, other, other)}


def beside_pictures(settings: Settings, batch: int, S: int) -> Offer:
    return {
        "image_sizes": torch.tensor([[S, S]]).expand(batch, -1).contiguous(),
        "input_points": torch.full((batch, 1, 2, 2), S / 2.0),
        "high_res_pixel_values": noise(batch, 3, S, S),
        "image_attention_mask": torch.ones(batch, 11, 1, dtype=torch.long),
        "merge_sizes": torch.full((batch,), settings.vision("spatial_merge_size", "merge_size", default=1)),
        "prompt_pixel_values": noise(batch, 3, S, S),
        "prompt_masks": noise(batch, 3, S, S),
        "qformer_input_ids": torch.full((batch, 6), 9),
        "image_embeds_position_mask": torch.arange(11).expand(batch, -1).gt(0)
        & torch.arange(11).lt(1 + settings.get("latent_query_num", default=0)),
        "qformer_attention_mask": torch.ones(batch, 6, dtype=torch.long),
    }


def videos(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    C, S, p = picture_sizes(settings)
    t = settings.vision("temporal_patch_size", default=1)
    if "video_grid_thw" in names:
        grid = torch.tensor([[1, GRID, GRID]]).expand(batch, -1).contiguous()
        flat = noise(batch * GRID * GRID, C * t * p * p)
        for values in (flat, flat.view(-1, C, p, p) if t == 1 else flat.view(-1, C, t, p, p)):
            yield {"signal": values, "video_grid_thw": grid}
    frames = settings.vision("num_frames", default=FRAMES)
    for shape in ((frames, C, S, S), (C, frames, S, S), (FRAMES, C, S, S)):
        yield {"signal": noise(batch, *shape)}


def patches_with_places(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """Pix2Struct: every patch with its row and column in front."""
    C, _, p = picture_sizes(settings)
    where = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"), -1).view(-1, 2) + 1.0
    values = torch.cat([where.expand(batch, -1, -1), noise(batch, GRID * GRID, C * p * p)], dim=2)
    yield {"signal": values, "attention_mask": torch.ones(batch, GRID * GRID)}


def spectra(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """Log-mel spectra [batch, mels, frames], or with the frames first."""
    mel_names = ("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_feat_size", "input_dim")
    mels = settings.audio(*mel_names, "input_size", "num_mels", default=80)
    longest = settings.audio("max_source_positions", "max_position_embeddings", default=64)
    longest = longest if isinstance(longest, int) and longest <= MOST_FRAMES else 64
    for frames in dict.fromkeys((2 * longest, 64, 88, 100, 200, 2 * longest + 2)):
        masks = ("feature_attention_mask", "input_features_mask", "audio_attention_mask", "padding_mask")
        together = dict.fromkeys(masks, torch.ones(batch, frames, dtype=torch.long))
        together["feature_lens"] = torch.full((batch,), frames)
        yield {**together, "signal": noise(batch, mels, frames)}
        yield {**together, "signal": noise(batch, frames, mels)}
        yield {"signal": noise(batch, mels, frames)}
        yield {"signal": noise(batch, frames, mels)}
        yield {"signal": noise(batch, 1, frames, mels)}
    size = settings.audio("spec_size", default=None)
    if isinstance(size, int):
        yield {"signal": noise(batch, 1, 4 * size, mels), "is_longer": torch.zeros(batch, 1, dtype=torch.bool)}


def waves(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """Raw sound, or what some models call input values although it is a spectrum."""
    for samples in (SAMPLES, 4 * SAMPLES):
        yield {"signal": noise(batch, samples)}
        yield {"signal": noise(batch, settings.get("audio_channels", default=1), samples)}
    mels = settings.audio("num_mel_bins", default=80)
    yield {"signal": noise(batch, settings.audio("max_length", default=64), mels)}


def hidden_states(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """What a part of a model gets from the one before it; patches where it is told of a grid."""
    if "grid_thw" in names:
        yield from pictures(settings, names, batch)
    width = settings.get("hidden_size", "d_model", "embed_dim", default=64)
    if "encoder" in names:
        width = settings.get("encoder_hidden_size", default=width)
    for shape in ((11, width), (width, 11), (GRID, GRID, width), (width, GRID, GRID)):
        yield {"signal": noise(batch, *shape)}


def series(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """A window of a time series."""
    length = settings.get("context_length", default=32)
    past = length + max(settings.get("lags_sequence", default=[0]))
    channels = settings.get("num_input_channels", "input_size", default=1)
    features = settings.get("num_time_features", default=1) + 0
    future = settings.get("prediction_length", default=4)
    beside = {
        "past_time_features": noise(batch, past, features),
        "past_observed_mask": torch.ones(batch, past),
        "future_time_features": noise(batch, future, features),
        "future_values": noise(batch, future),
    }
    yield {**beside, "signal": noise(batch, past)}
    yield {"signal": noise(batch, length, channels)}
    yield {"signal": noise(batch, length)}


def decisions(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    yield {
        "signal": noise(batch, 5, settings.get("state_dim", default=17)),
        "actions": noise(batch, 5, settings.get("act_dim", default=4)),
        "rewards": noise(batch, 5, 1),
        "returns_to_go": noise(batch, 5, 1),
        "timesteps": torch.arange(5).expand(batch, -1).contiguous(),
        "attention_mask": torch.ones(batch, 5, dtype=torch.long),
    }


def codes(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """Ids of a codec, by time and by codebook."""
    books = settings.get("num_codebooks", "num_quantizers", "n_codes_total", default=4)
    drawn = torch.randint(0, 16, (batch, 12, books), generator=torch.Generator().manual_seed(3))
    yield {"signal": drawn}
    yield {"signal": drawn.transpose(1, 2).contiguous()}
    yield {"signal": drawn[..., 0].contiguous()}


def words(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    length = settings.get("task_seq_len", default=12) if "task_inputs" in names else 12
    drawn = torch.randint(4, 20, (batch, length), generator=torch.Generator().manual_seed(3))
    yield {"signal": drawn, "protein_attention_mask": torch.ones_like(drawn)}


def regions(settings: Settings, names: set[str], batch: int) -> Iterator[Offer]:
    """What a detector saw, with boxes."""
    yield {
        "signal": noise(batch, 6, settings.get("visual_feat_dim", "visual_embedding_dim", default=64)),
        "visual_pos": noise(batch, 6, settings.get("visual_pos_dim", default=4)),
        "visual_attention_mask": torch.ones(batch, 6),
    }


def with_width(signal: Signal, width: int, batch: int) -> Iterator[Offer]:
    """In the width that a model's first projection has."""
    if signal.name == "flattened_patches":
        places = torch.arange(1.0, 1 + GRID * GRID)[None, :, None].expand(batch, -1, 2)
        yield {signal.name: torch.cat([places, noise(batch, GRID * GRID, width)], dim=2)}
        return
    for shape in ((batch, 64, width), (batch, width, 64), (batch * GRID * GRID, width)):
        yield {signal.name: noise(*shape)}


SIGNALS = (
    Signal("flattened_patches", "image", patches_with_places),
    Signal("pixel_values", "image", pictures),
    Signal("image", "image", pictures),
    Signal("pixel_values_images", "image", pictures),
    Signal("pixel_values_videos", "video", videos),
    Signal("input_features", "audio", spectra),
    Signal("audio_input_features", "audio", spectra),
    Signal("input_values", "audio", waves),
    Signal("audio_values", "audio", waves),
    Signal("past_values", "series", series),
    Signal("states", "states", decisions),
    Signal("audio_codes", "codes", codes),
    Signal("codebook_idx", "codes", codes),
    Signal("task_inputs", "task", words),
    Signal("protein_input_ids", "protein", words),
    Signal("visual_feats", "regions", regions),
    Signal("visual_embeds", "regions", regions),
    Signal("audio_mel", "audio", spectra),
    Signal("spectrogram", "audio", spectra),
    Signal("hidden_states", "hidden states", hidden_states),
    Signal("inputs_embeds", "hidden states", hidden_states),
    Signal("input_embeds", "hidden states", hidden_states),
    Signal("context", "hidden states", hidden_states),
    Signal("query_embeds", "hidden states", hidden_states),
    Signal("encoder_hidden_states", "hidden states", hidden_states),
)
