"""Data sets: JSONL rows to tokenized prompts, demonstrations, preferences and feedback, in an order that every rank computes
identically.

In: JSONL files or a generated task, and the model folder's tokenizer. Out: `Prompt`, `TokenizedAnswer` and `Pair` rows from
endless, checkpointable streams, and `Samples`, the batches that roles exchange.
"""
