"""An agent program with the OpenAI SDK (docs/agents.md): it asks, checks the answer, and asks again, three times at most."""

import json
import os

from openai import OpenAI

task = json.loads(os.environ["ALIGNER_TASK"])  # the row of data.path
client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY are set
messages = [{"role": "user", "content": task["prompt"]}]
reward = 0.0
for attempt in range(3):
    choice = client.chat.completions.create(model="policy", messages=messages).choices[0]
    messages.append(choice.message)
    if task["answer"] in (choice.message.content or ""):
        reward = 1.0 - 0.25 * attempt
        break
    messages.append({"role": "user", "content": "That is wrong. Try again."})
print(json.dumps({"reward": reward}))
