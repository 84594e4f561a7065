"""An agent program (docs/agents.md) that plays one task of a verifiers environment as it is; it runs in that package's own Python.

    environment.agent.command="VENV/bin/python docs/examples/verifiers_agent.py hangman.json"

The file holds an object: taskset (id and its settings), and if wanted harness (id and settings), renderer (of the renderers
package). With `--rows N` it prints N rows for data.path, which name tasks by number.
"""

import asyncio
import json
import os
import sys
import urllib.request

import verifiers.v1 as vf
from verifiers.v1.utils.loaders import env_config_type, load_environment, resolve_env_config


def environment(settings: dict) -> vf.Env:
    """Every role is played by the policy, in processes of this machine."""
    roles = [
        name
        for name, field in env_config_type(settings["taskset"]["id"], "").model_fields.items()
        if isinstance(field.default, vf.AgentConfig)
    ]
    role = {"runtime": {"type": "subprocess"}}
    if "harness" in settings:
        role["harness"] = settings["harness"]
    return load_environment(resolve_env_config({"taskset": settings["taskset"], **{name: role for name in roles}}))


async def play(settings: dict, task: vf.Task) -> vf.Episode:
    """One episode; the policy gets token ids and gives token ids."""
    client = vf.TrainClientConfig(
        base_url=os.environ["OPENAI_BASE_URL"],
        api_key_var="OPENAI_API_KEY",
        renderer=settings.get("renderer"),
        renderer_model_name=os.environ["ALIGNER_TOKENIZER"],
    )
    env = environment(settings)
    context = vf.ModelContext(model=os.environ["ALIGNER_MODEL"], client=client)
    async with env.serving():
        return await env.run_slot(env.slots(task)[0], context)


def report(episode: vf.Episode) -> None:
    """The mean over the traces' rewards."""
    rewards = [trace.reward for trace in episode.traces]
    body = {"reward": sum(rewards) / len(rewards), "metrics": {"verifiers_turns": episode.num_turns}}
    url, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
    urllib.request.urlopen(
        urllib.request.Request(f"{url}/reward", json.dumps(body).encode(), {"Authorization": f"Bearer {key}"})
    ).read()


def main() -> None:
    with open(sys.argv[1]) as file:
        settings = json.load(file)
    os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    tasks = iter(environment(settings).taskset)
    if "--rows" in sys.argv:
        for number in range(int(sys.argv[sys.argv.index("--rows") + 1])):
            print(json.dumps({"prompt": next(tasks).data.prompt_text or "-", "task": number}))
        return
    number = json.loads(os.environ["ALIGNER_TASK"])["task"]
    task = next(task for place, task in enumerate(tasks) if place == number)
    episode = asyncio.run(play(settings, task))
    if not episode.ok:
        raise SystemExit("; ".join(str(error.message) for one in (episode, *episode.traces) for error in one.errors))
    report(episode)


if __name__ == "__main__":
    main()
