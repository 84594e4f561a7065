"""One file for each kind of environment, standard library besides the environment's own package; `worker.py` runs them.

`make(host)` imports the environment named by `host.target` (raises `host.Unusable`) and returns a factory of episodes:

    open(row, seed) -> turn        step(text, tool_calls) -> turn        finish() -> {"reward", "metrics"}        close()

A turn is a dict: messages, and done, reward, metrics, tools, replaces where they are not the defaults of
`aligner.environments.protocol.Turn`. `host.WrongAnswer` is raised for an answer of the wrong form. With GLOBAL_RANDOM = True
one call runs at a time, with global random generators of its episode's own.
"""
