"""What is read: rows of JSON become prompts, demonstrations, preferences and feedback, in an order that every rank
computes alike.

In: JSONL files or a generated task, and a model folder's tokenizer. Out: `Prompt`, `Answered` and `Pair` rows from
endless, restorable streams, and `Samples`, the rows that the roles exchange.
"""
