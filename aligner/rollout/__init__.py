"""2. prompts -> samples: vLLM inside the job's own ranks; whatever touches vLLM's internals stays in this package.

In: prompts as token ids with a seed each, and the policy's weights by region.
Out: sampled tokens and the log-probabilities they were drawn with.

Read in this order: config -> role -> engine -> subworld (an engine on part of the world) -> dry_run -> weights.
"""
