"""How good a response is: rules in processes of their own, each with a time limit; a failure is never a zero.

In: prompts' and responses' texts with the prompts' JSON fields. Out: one `Score` a row, with a `Status`.
"""
