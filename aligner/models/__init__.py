"""What a model family must declare, and Hugging Face checkpoints in and out of any layout.

In: a Hugging Face folder. Out: a `ModelSpec`, the parameters that its tensors make and their cuts, and a Hugging Face folder again.
"""
