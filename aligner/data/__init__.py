"""Data sets: rows of files to tokenized prompts, demonstrations, preferences and feedback, in an order that every rank computes
identically.

In: files as people have them or a generated task, and the model folder's tokenizer. Out: `Prompt`, `TokenizedAnswer` and `Pair` rows from
endless, checkpointable streams, and `Samples`, the batches that roles exchange.
"""
