"""vLLM inside the job's own ranks: whatever touches vLLM's internals stays in this package.

Read in this order: engine -> subworld (an engine on part of the world) -> requests -> dry_run -> weights.
"""
