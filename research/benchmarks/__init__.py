"""Benchmarks of ntk-attention: one registry, one command, one row of JSON per measurement.

python -m benchmarks list
python -m benchmarks attention decode      # rows go to results/benchmarks/NAME.jsonl as soon as they are measured
python -m benchmarks report                # tables and plots from the rows alone
"""
