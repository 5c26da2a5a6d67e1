"""A task of lm-eval with an adapter and without it: pip install lm_eval.

python -m examples.lm_evaluation MODEL ADAPTER TASK [FOLDER OF TASKS]
"""

import sys

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import ntk_attention  # noqa: F401  # registers the method


def main(model_name: str, adapter: str, task: str, folder: str | None = None) -> dict[str, dict]:
    """Returns lm-eval's figures, by "base" and "adapter"."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_name), adapter)
    tasks = TaskManager(include_path=folder)

    def evaluate() -> dict:
        # lm-eval takes a model that is ready; its own `peft=` option loads one by name, after `import ntk_attention`.
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
        return lm_eval.simple_evaluate(lm, tasks=[task], task_manager=tasks)["results"][task]

    with model.disable_adapter():
        results = {"base": evaluate()}
    results["adapter"] = evaluate()
    for name, figures in results.items():
        print(name, {k: v for k, v in figures.items() if isinstance(v, float)})
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
