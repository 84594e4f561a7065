"""An agent with the OpenAI SDK: streams, tools, asynchronous requests; nothing in it knows of aligner but its reward."""

import asyncio
import json

from openai import AsyncOpenAI, OpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]


def add(a, b):
    return a + b


def streamed(client, messages):
    """The message of a stream, as the SDK puts it together."""
    with client.chat.completions.stream(model="gpt-4o", messages=messages, tools=TOOLS, temperature=0.2) as stream:
        return stream.get_final_completion().choices[0].message


async def goodbye(messages):
    async with AsyncOpenAI() as client:
        chunks = await client.chat.completions.create(
            model="gpt-4o", messages=messages, tools=TOOLS, stream=True, stream_options={"include_usage": True}
        )
        text, usage = "", None
        async for chunk in chunks:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        return text, usage.total_tokens


def main():
    messages = [{"role": "system", "content": "You add."}, {"role": "user", "content": "1 + 2?"}]
    with OpenAI() as client:
        message = streamed(client, messages)
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed": True}))
        for call in message.tool_calls:
            result = add(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        message = client.chat.completions.create(model="gpt-4o", messages=messages, tools=TOOLS).choices[0].message
    messages += [{"role": "assistant", "content": message.content}, {"role": "user", "content": "Thanks."}]
    text, total = asyncio.run(goodbye(messages))
    right = message.content == "3" and message.reasoning_content == "So 3." and text == "Bye." and total > 0
    print(json.dumps({"reward": float(right)}))


if __name__ == "__main__":
    main()
