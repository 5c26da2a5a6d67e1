"""NTK-Attention against full fine-tuning, LoRA, prefixes and others, at equal size and tuned learning rates.

python -m research prepare              # models and data that need no hub, once
python -m research pretrain             # the ViT of the picture tasks, once
python -m research run --jobs 8         # rows go to results/experiments/rows.jsonl as cells finish
python -m research time                 # step times, one method at a time
python -m research report               # tables, figures and one HTML page from the rows alone
"""
