"""Benchmarks of ntk-attention: one registry, one command, one row of JSON per measurement.

python -m research bench list
python -m research bench attention decode  # rows go to results/benchmarks/NAME.jsonl as soon as they are measured
python -m research bench report            # tables and plots from the rows alone
"""
