"""Rewards: Python rules in worker processes, HTTP endpoints, reward models, or a weighted sum of them.

In: texts of prompts and responses with the prompts' JSON fields. Out: `Rewards`: one reward per row with a `Status`, and
the raw value of each component. Rows whose scoring fails have no reward (NaN), are counted by kind, and are never scored 0.
"""
