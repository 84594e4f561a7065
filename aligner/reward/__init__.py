"""How good a response is: rules in processes of their own, endpoints, the reward model, or a weighted sum of them.

In: prompts' and responses' texts with the prompts' JSON fields. Out: `Scores`: one reward a row with a `Status`, and
the raw value of each component. A failure of any kind is counted by kind and is never a zero.
"""
