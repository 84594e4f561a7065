"""2. prompts -> samples: an engine (vLLM, or the transformers library) inside the job's own ranks.

In: prompts as token ids with a seed each, and the policy's weights by region.
Out: sampled tokens and the log-probabilities they were drawn with.

Read in this order: config -> role -> generation -> engine (what an engine is) -> engines (which there are).
"""
