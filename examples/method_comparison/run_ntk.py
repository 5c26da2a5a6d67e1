"""PEFT's method_comparison/MetaMathQA/run.py, where NTK-Attention is known and calibrated; to be put beside it."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ntk_attention import NTKAttentionConfig, calibrate

EXAMPLES, BATCH = 32, 4  # a few thousand tokens, in batches as those of their training


def calibrated(get_model: Callable[..., Any], batches: Callable[[], list[dict[str, Any]]]) -> Callable[..., Any]:
    """Their `get_model`, after which our adapters are calibrated; those of other methods are as they were."""

    def get(*, compile: bool, peft_config: Any, **options: Any) -> Any:
        model = get_model(compile=compile, peft_config=peft_config, **options)
        if isinstance(peft_config, NTKAttentionConfig):
            if compile:
                raise ValueError('a compiled model cannot be calibrated: expected "compile": false')
            calibrate(model, [{name: x.to(model.device) for name, x in batch.items()} for batch in batches()])
        return model

    return get


def training_batches(utils: Any, data: Any, experiment: str) -> list[dict[str, Any]]:
    """The first training examples, made into tokens as `run.py` does it."""
    config = utils.get_train_config(str(Path(experiment) / utils.FILE_NAME_TRAIN_PARAMS))
    tokenizer = utils.get_tokenizer(model_id=config.model_id, max_seq_length=config.max_seq_length)
    train, _, _ = data.get_train_valid_test_datasets(
        tokenizer=tokenizer, query_template=config.query_template, print_fn=lambda *_, **__: None
    )
    rows = train[:EXAMPLES]
    parts = [
        {name: rows[name][i : i + BATCH] for name in ("input_ids", "attention_mask")} for i in range(0, EXAMPLES, BATCH)
    ]
    return [dict(tokenizer.pad(part, return_tensors="pt")) for part in parts if part["input_ids"]]


def main(arguments: list[str]) -> None:
    folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(folder))
    import data
    import utils

    experiment = next((argument for argument in arguments if not argument.startswith("-")), "")
    utils.get_model = calibrated(utils.get_model, lambda: training_batches(utils, data, experiment))
    sys.argv = [str(folder / "run.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
