"""Environments and tools, in CPU processes outside the ranks: an episode is a conversation of a policy with one of them.

In: rows of a data set, and what the policy said (text and tool calls). Out: messages, rewards, and how each episode ended.

Read in this order: config -> episodes (what plays an episode: asks for turns, gives them to its environment) -> conversation
(messages as token ids) and tool_calls (text as calls) -> pool (many episodes at once, their limits and failures) -> worker (a
process of them, one file of standard library) -> adapters/ (one file for each kind of environment).
"""
