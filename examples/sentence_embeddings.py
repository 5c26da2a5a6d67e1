"""Training a sentence-transformers model with an adapter: pip install sentence-transformers.

python -m examples.sentence_embeddings MODEL PAIRS.jsonl OUT      # lines with an anchor and a positive

`add_adapter` is transformers' own, which asks for a PEFT of its time: 5.17 for 0.19.1, 5.24 for 0.22.
"""

import sys

from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from ntk_attention import NTKAttentionConfig, calibrate

STEPS = 20


def main(model_name: str, pairs: str, output: str) -> SentenceTransformer:
    """Returns the trained model; `SentenceTransformer(output)` loads it again."""
    model = SentenceTransformer(model_name)
    model.add_adapter(NTKAttentionConfig(task_type="FEATURE_EXTRACTION"))
    dataset = load_dataset("json", data_files=pairs, split="train")
    texts = dataset["anchor"][:64]
    calibrate(model[0].auto_model, [dict(model.tokenizer(texts, padding=True, return_tensors="pt"))])
    arguments = SentenceTransformerTrainingArguments(
        output_dir=output, max_steps=STEPS, learning_rate=3e-3, logging_steps=1, report_to=[]
    )
    trainer = SentenceTransformerTrainer(model, arguments, dataset, loss=MultipleNegativesRankingLoss(model))
    trainer.train()
    model.save_pretrained(output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last; model in {output}")
    return model.eval()


if __name__ == "__main__":
    main(*sys.argv[1:4])
