"""The endpoint: agent programs with a loop of their own reach the policy over HTTP, and episodes are recorded exactly.

In: a command, and tasks. Out: `Ask`s for turns, and how each episode ended (an `EpisodeSource`).

Read in this order: ..agent_config -> requests, responses (the wire) -> server (threads) -> exchange (what threads hand over) ->
programs (processes) -> agents (the episodes).
"""
