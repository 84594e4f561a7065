"""Model families and Hugging Face checkpoints, read and written under any parallel layout.

In: a Hugging Face folder. Out: a `ModelSpec`, the engines' parameters with the checkpoint regions they hold, and a Hugging Face
folder again.
"""
