"""Episodes of several turns: environments and agents ask, the engine samples, rows of turns come out.

In: tasks (prompts) and an `EpisodeSource` on the first rank of each replica. Out: `Samples`, one row for each episode.
"""
