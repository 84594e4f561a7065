"""The loop and the rules of tools/bench/faults.py, which copies this file beside each job as own.py."""

import ctypes
import os
import resource
import signal
import time
from pathlib import Path

from aligner.algorithms.grpo import GrpoConfig, grpo

FAULT = os.environ.get("ALIGNER_FAULT", "")


def hit(what):
    """Says when, and whether this is where."""
    if what != FAULT:
        return False
    print(f"FAULT {time.time()}", flush=True)
    return True


def faulty(roles, batches, cfg: GrpoConfig):
    """GRPO, and the fault after its second step, on one rank."""
    world = roles.policy.world
    if FAULT == "engine" and world.rank == 1:
        break_engine(roles.rollout.engine)
    for step, result in enumerate(grpo(roles, batches, cfg), start=1):
        yield result
        if step == 2:
            at_step(world, roles)


def at_step(world, roles):
    first = world.rank == 0
    if (first and hit("first_killed")) or (not first and hit("killed")):
        os.kill(os.getpid(), signal.SIGKILL)
    if (first and hit("first_stopped")) or (not first and hit("stopped")):
        os.kill(os.getpid(), signal.SIGSTOP)
    if not first and hit("asleep"):
        time.sleep(10_000)
    if not first and hit("lock_held"):
        ctypes.PyDLL(None).sleep(10_000)
    if first and FAULT == "skipped":
        hit("skipped")
    if first or FAULT != "skipped":
        roles.policy.map(nothing)  # a role call that one rank leaves out
    if not first and hit("memory"):
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
        kept = []
        while True:
            kept.append(bytearray(1 << 20))


def nothing():
    return None


def break_engine(engine):
    """vLLM's own executor fails in the 20th engine step."""
    core = engine._llm.engine_core.engine_core
    execute, steps = core.model_executor.execute_model, []

    def failing(*args, **kwargs):
        steps.append(1)
        if len(steps) == 20:
            hit("engine")
            raise RuntimeError("an engine step went wrong")
        return execute(*args, **kwargs)

    core.model_executor.execute_model = failing


def digits(prompt, response, **fields):
    """Share of digits in the response: random text earns different rewards."""
    return sum(c.isdigit() for c in response) / max(1, len(response)) + 0.01 * len(response)


def sleeping(prompt, response, **fields):
    hit("reward_asleep")
    time.sleep(10_000)


def eating(prompt, response, **fields):
    hit("reward_memory")
    return len([bytearray(1 << 20) for _ in range(1 << 20)])
