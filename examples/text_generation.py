"""Generation with transformers' pipeline.

python -m examples.text_generation MODEL ADAPTER "a prompt"
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import ntk_attention  # noqa: F401  # registers the method


def main(model_name: str, adapter: str, prompt: str) -> str:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_name), adapter)
    generator = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(model_name))
    text = generator(prompt, max_new_tokens=20, do_sample=False, return_full_text=False)[0]["generated_text"]
    print(text)
    return text


if __name__ == "__main__":
    main(*sys.argv[1:4])
