"""What a model family must declare, and Hugging Face checkpoints in and out of any layout.

In: a Hugging Face folder. Out: a `ModelSpec`, the regions each Megatron rank holds, and a Hugging Face folder again.
"""
