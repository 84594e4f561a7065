"""Simulated duration of a schedule at given link speeds, the waiting of ranks for each other included (no torch)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from aligner.reshard.plan.schedule import Message, Schedule


def schedule_seconds(schedules: Mapping[int, Schedule], bytes_per_second: float, latency: float) -> float:
    """Seconds until the last rank is done, where each link carries `bytes_per_second` each way at the same time.

    A message starts when both of its ends have reached the step that it is part of, and takes `latency` seconds and its
    bytes' time; a rank goes on when both messages of its step are done. Packing and applying are not counted: they
    happen meanwhile.

    Args:
        schedules: of every rank of the plan, all made with the same staging.
    """
    reached = dict.fromkeys(schedules, 0.0)
    step_of = dict.fromkeys(schedules, 0)
    posted: dict[Message, float] = {}
    done: dict[Message, float] = {}
    ready = deque(schedules)
    while ready:
        rank = ready.popleft()
        schedule = schedules[rank]
        if step_of[rank] == len(schedule.steps):
            continue
        for message in filter(None, schedule.steps[step_of[rank]]):
            if message not in posted:
                posted[message] = reached[rank]
                continue
            size = sum(item.bytes for item in schedule.items(message))
            done[message] = max(posted[message], reached[rank]) + latency + size / bytes_per_second
            for end in (message.sender, message.receiver):
                times = [done.get(other) for other in schedules[end].steps[step_of[end]] if other]
                if all(time is not None for time in times):
                    reached[end] = max(time for time in times if time is not None)
                    step_of[end] += 1
                    ready.append(end)
    waiting = [rank for rank, schedule in schedules.items() if step_of[rank] < len(schedule.steps)]
    assert not waiting, f"ranks {waiting} wait for each other"
    return max(reached.values(), default=0.0)
