"""Metrics, the console, readable samples, timelines, reports: what people read of a run.

In: one row of numbers a step and a few samples, on rank 0. Out: under the run's folder, metrics.jsonl,
environment.json, samples/*.md, learning_curve.png, report.html and (when asked for) a wandb run; on the console, one
table row a step.
"""
