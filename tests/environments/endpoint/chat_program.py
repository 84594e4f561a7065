"""An agent program without packages: argv says what it does (`PROGRAMS`)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

URL, KEY = os.environ["ALIGNER_URL"], os.environ["OPENAI_API_KEY"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def post(path: str, body: Any, **headers: str) -> Any:
    """The answer, or the error's JSON."""
    request = urllib.request.Request(
        URL + path, json.dumps(body).encode(), {"Authorization": f"Bearer {KEY}", **headers}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        return json.loads(error.read())


def say(messages: list[Any], **more: Any) -> dict[str, Any]:
    """The policy's message."""
    answer = post("/v1/chat/completions", {"model": "any", "messages": messages, **more})
    return dict(answer["choices"][0]["message"]) if "choices" in answer else dict(answer)


def talk(turns: int) -> list[Any]:
    """A conversation of that many turns about the task."""
    messages: list[Any] = [{"role": "user", "content": json.loads(os.environ["ALIGNER_TASK"])["question"]}]
    for turn in range(turns):
        messages.append(say(messages))
        messages.append({"role": "user", "content": f"More {turn}"})
    return messages


def main(what: str) -> None:
    """One program."""
    if what == "talk":
        talk(3)
        post("/v1/reward", {"reward": 2.5, "turn_rewards": [0.5, 1, 1], "metrics": {"words": 4}})
    elif what == "print":
        talk(1)
        print('noise\n{"reward": 0.25}')
    elif what == "print_text":
        talk(1)
        print('{"reward": "high"}')
    elif what == "tool":
        messages: list[Any] = [{"role": "user", "content": "Add."}]
        said = say(messages, tools=TOOLS)
        (call,) = said["tool_calls"]
        # As programs write it back: no null fields, other spaces in the arguments.
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=1)
        messages += [
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "3"},
        ]
        say(messages, tools=TOOLS)
        print('{"reward": 1}')
    elif what == "one_call":
        messages = [{"role": "user", "content": "Add."}]
        said = say(messages, tools=TOOLS, parallel_tool_calls=False)
        (call,) = said["tool_calls"]
        say([*messages, said, {"role": "tool", "tool_call_id": call["id"], "content": "3"}], tools=TOOLS)
        print('{"reward": 1}')
    elif what == "rewrite":
        messages = talk(1)
        messages[1]["content"] = "something else"
        say(messages)
        print('{"reward": 1}')
    elif what == "branches":
        base: list[Any] = [{"role": "user", "content": "Go."}]
        said = say(base)
        names = ["a", "b", "c"]
        threads = [threading.Thread(target=say, args=([*base, said, {"role": "user", "content": n}],)) for n in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print('{"reward": 1}')
    elif what == "sub_agents":
        plan = say([{"role": "user", "content": "Plan."}])["content"]
        answers: dict[str, str] = {}

        def sub_agent(name: str) -> None:
            task = [{"role": "user", "content": f"{plan} {name[0]}"}]
            said = say(task, seed=len(name))
            answers[name] = say([*task, said, {"role": "user", "content": "More."}], seed=len(name))["content"]

        threads = [threading.Thread(target=sub_agent, args=(name,)) for name in ("a", "b", "aa")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        say(
            [
                {"role": "user", "content": "Sum up."},
                *({"role": "user", "content": answers[n]} for n in sorted(answers)),
            ]
        )
        print(json.dumps({"reward": float(len(set(answers.values())) == 3)}))
    elif what == "generate":
        ids = [1, 2, 3]
        for _ in range(2):
            answer = post(
                "/inference/v1/generate", {"token_ids": ids, "sampling_params": {"logprobs": 1, "max_tokens": 5}}
            )
            ids += [*answer["choices"][0]["token_ids"], 7]
        post("/v1/reward", {"reward": 1})
    elif what == "again":
        messages = [{"role": "user", "content": "Hi."}]
        first = say(messages)
        body = {"messages": messages}
        again = post("/v1/chat/completions", body, **{"x-stainless-retry-count": "1"})["choices"][0]["message"]
        print(json.dumps({"reward": float(again == first)}))
    elif what == "greedy":
        for _ in range(20):
            if "error" in (said := say([{"role": "user", "content": "Hi."}])):
                print(said["error"]["message"], file=sys.stderr)
                post("/v1/reward", {"reward": 1})
                raise SystemExit(3)
    elif what == "long":
        said = say([{"role": "user", "content": "x" * 5000}])
        print(json.dumps({"reward": float(said["error"]["code"] == "context_length_exceeded")}))
        say([{"role": "user", "content": "x"}])
        print(json.dumps({"reward": float(said["error"]["code"] == "context_length_exceeded")}))
    elif what == "stop":
        messages = [{"role": "user", "content": "Hi."}]
        said = say(messages, stop=["b"])
        say([*messages, said, {"role": "user", "content": "On."}])
        print(json.dumps({"reward": float(said["content"] == "a")}))
    elif what == "surrogate":
        said = say([{"role": "user", "content": "\ud800"}])
        say([{"role": "user", "content": "x"}])
        print(json.dumps({"reward": float("error" in said)}))
    elif what == "silent":
        talk(1)
    elif what == "nothing":
        print('{"reward": 1}')
    elif what == "crash":
        talk(1)
        raise RuntimeError("the tool broke")
    elif what == "hang":
        talk(1)
        time.sleep(600)
    elif what == "never":
        time.sleep(600)
    elif what == "memory":
        talk(1)
        held = [bytearray(50_000_000) for _ in range(100)]
        print(len(held))
    elif what == "orphans_memory":
        talk(1)
        for _ in range(2):  # each leaves its parent, and is within the limit by itself
            if os.fork() == 0:
                if os.fork() == 0:
                    text = b"x" * 150_000_000
                    time.sleep(600 + len(text))
                os._exit(0)
        time.sleep(600)
    elif what == "liar":
        talk(1)
        post("/v1/reward", {"reward": 1, "turn_rewards": [1, 2, 3]})
    elif what == "orphan":
        talk(1)
        if os.fork() == 0:
            os.setsid()
            with open(os.environ["PID_FILE"], "w") as file:
                file.write(str(os.getpid()))
            time.sleep(600)
        path = Path(os.environ["PID_FILE"])
        while not (path.exists() and path.read_text()):
            time.sleep(0.01)
        print('{"reward": 1}')
    elif what == "environment":
        kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "ALIGNER_URL")}
        talk(1)
        with open(os.environ["ALIGNER_TASK_FILE"]) as file:
            kept["file"] = file.read()
        print(json.dumps(kept))
        print('{"reward": 1}')


main(sys.argv[1])
