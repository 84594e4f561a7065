"""What is read: rows of JSON become prompts and demonstrations, in an order that every rank computes alike.

In: JSONL files or a generated task, and a model folder's tokenizer. Out: `Prompt`s and `Demonstration`s from endless,
restorable streams, and `Samples`, the rows that the roles exchange.
"""
