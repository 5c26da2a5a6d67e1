"""Putting an adapter on the hub: whether that can work is asked before a run, not after it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

# The adapter, its card and its tokenizer; what the run was and read stays here.
PUSHED = ["adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer*", "special_tokens_map.json"]
PUSHED += ["chat_template*", "vocab*", "merges.txt", "added_tokens.json", "*.model"]


def check_push(repository: str) -> None:
    """Raise ValueError unless the name is one and the hub knows who we are."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: {repository!r} is no name of a repository: {error}") from None
    try:
        HfApi().whoami()
    except Exception as error:  # of the net, of the hub, of a missing token
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"push_to_hub: the hub does not let us in (hf auth login): {reason}") from None


def push(folder: Path, repository: str) -> str:
    """Upload an adapter, into a private repository where there is none yet, and return its address.

    Raises:
        ValueError: if that fails; the adapter is in its folder all the same.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=PUSHED)
    except Exception as error:  # of the net, of the hub
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the adapter is in {folder}, but could not be put on the hub: {reason}; `hf upload {repository} {folder}` "
            "tries again"
        ) from None
    return str(address)
