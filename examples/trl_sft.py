"""Supervised fine-tuning with TRL's SFTTrainer: pip install trl.

python -m examples.trl_sft MODEL DATA.jsonl OUT      # lines with a prompt and a completion
"""

import sys

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ntk_attention import NTKAttentionConfig, calibrate

STEPS = 20


def main(model_name: str, data: str, output: str) -> list[float]:
    """Returns the losses of the steps."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name)
    model = get_peft_model(model, NTKAttentionConfig(task_type="CAUSAL_LM"))
    dataset = load_dataset("json", data_files=data, split="train")
    arguments = SFTConfig(
        output_dir=output,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(4), strict=False)]
    calibrate(model, [{k: batch[k] for k in ("input_ids", "attention_mask")} for batch in batches])
    trainer.train()
    trainer.save_model(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; adapter in {output}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:4])
