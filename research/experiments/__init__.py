"""NTK-Attention against full fine-tuning, LoRA, prefixes and others, at equal size and tuned learning rates.

python -m experiments prepare              # models and data that need no hub, once
python -m experiments pretrain             # the ViT of the picture tasks, once
python -m experiments run --jobs 8         # rows go to results/experiments/rows.jsonl as cells finish
python -m experiments time                 # step times, one method at a time
python -m experiments report               # tables, figures and one HTML page from the rows alone
"""
