"""The PEFT method: states as adapters of the attention modules of a model of transformers."""
