"""Contexts of episodes, built turn by turn, are those of the whole conversation encoded by transformers; what was sampled stays."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aligner.data.chat import ChatOptions
from aligner.data.tokenizer import encode_continuation
from aligner.environments.conversation import Conversation, ConversationFormat, TemplateError, prompt_messages
from tests.data import tokenizer_kinds
from tests.environments.families import FAMILIES, Family, stop_ids, tokenizer_of

TOOL_KINDS = ["byte_level_split", "pieces_legacy", "pieces"]
PROPERTIES = {"a": {"type": "integer"}, "b": {"type": "integer"}}
ADD = {
    "name": "add",
    "description": "Add.",
    "parameters": {"type": "object", "properties": PROPERTIES, "required": ["a", "b"]},
}
TOOLS = [{"type": "function", "function": ADD}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calls(*numbers: int) -> dict[str, Any]:
    made = [
        {"type": "function", "id": f"call0000{n}", "function": {"name": "add", "arguments": {"a": n, "b": 2}}}
        for n in numbers
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "content": f"{number + 2}", "tool_call_id": f"call0000{number}", "name": "add"}


PLAIN = [user("What is it?"), says("It is 3."), user("  And now? "), says("Now 4"), user("Why?"), says("So.")]
CALLS = [user("What is 1+2+2?"), calls(1), result(1), calls(3), result(3), says("It is 5.")]
SEVERAL = [user("1+2? 3+2?"), calls(1, 3), result(1), result(3), says("3 and 5.")]
ONE_CALL = {"llama3.1", "llama3.2", "gpt-oss"}
"""Templates that take one call in a turn."""
KEEPING = [name for name, family in FAMILIES.items() if family.keeps]


def form_of(family: Family, kind: str = "byte_level_split", **more: Any) -> ConversationFormat:
    tokenizer = tokenizer_of(family, kind)
    return ConversationFormat(tokenizer, stop_ids(tokenizer, family), **more)


def turns_of(messages: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """(the messages before, the assistant's) of each turn."""
    turns, before = [], []
    for message in messages:
        if message["role"] == "assistant":
            turns.append((before, message))
            before = []
        else:
            before.append(message)
    return turns


def check_against_whole(form: ConversationFormat, messages: list[dict[str, Any]], tools: Any = None) -> int:
    """Each context is what transformers encodes for the conversation so far, of which the answers are parts.

    Where the tokenizer merges an answer's beginning with the generation prompt, which no model does that generates, only what
    follows the answer is compared. Returns how often that was so.
    """
    tokenizer = form.tokenizer
    turns = turns_of(messages)
    conversation = Conversation(form)
    context = list(conversation.open(turns[0][0], tools))
    merged = 0
    for (_, assistant), (after, _) in pairwise(turns):
        so_far = [*conversation.messages, assistant, *after]
        whole = tokenizer.apply_chat_template(
            so_far, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        known = len(context)
        clean = whole[: len(context)] == context
        rest = whole[len(context) :] if clean else [*plain(tokenizer, "Hi"), min(form.ends)]
        sampled = rest[: next(place for place, token in enumerate(rest) if token in form.ends) + 1]
        extension = conversation.extend(sampled, assistant, after)
        assert not extension.new_segment
        context = list(extension.ids)
        if clean:
            assert context == whole
        else:
            merged += 1
            size = len(context) - known - len(sampled)
            assert context[-size:] == whole[-size:]
    return merged


@pytest.mark.parametrize("kind", TOOL_KINDS)
@pytest.mark.parametrize("name", KEEPING)
def test_turn_by_turn_gives_the_ids_of_the_whole_conversation(name: str, kind: str) -> None:
    assert check_against_whole(form_of(FAMILIES[name], kind), PLAIN) == 0


@pytest.mark.parametrize("kind", TOOL_KINDS)
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools and name != "lfm2"])
def test_tool_calls_give_the_ids_of_the_whole_conversation(name: str, kind: str) -> None:
    form = form_of(FAMILIES[name], kind)
    form.check_tools()
    merged = check_against_whole(form, CALLS, TOOLS)
    if name not in ONE_CALL:
        merged += check_against_whole(form, SEVERAL, TOOLS)
    assert kind != "byte_level_split" or merged == 0


def test_mistrals_own_tokenizer(tmp_path: Path) -> None:
    """A SentencePiece model of 32768 pieces, which comes with mistral_common."""
    source = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(source, tmp_path / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = FAMILIES["mistral"].source
    form = ConversationFormat(tokenizer)
    for messages, tools in ((PLAIN, None), (CALLS, TOOLS), (SEVERAL, TOOLS)):
        assert check_against_whole(form, messages, tools) == 0


@pytest.mark.parametrize("kind", list(tokenizer_kinds.KINDS))
@pytest.mark.parametrize(
    "template", ["chatml", "headers", "gemma", "phi_ends_conversations", "zephyr", "vicuna", "dated"]
)
def test_other_templates_and_tokenizers(kind: str, template: str) -> None:
    check_against_whole(ConversationFormat(tokenizer_kinds.tokenizer_of(kind, template)), PLAIN)


def opened(form: ConversationFormat, *messages: dict[str, Any], tools: Any = None) -> tuple[Conversation, list[int]]:
    conversation = Conversation(form)
    return conversation, list(conversation.open(list(messages), tools))


def plain(tokenizer: PreTrainedTokenizerFast | Any, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert isinstance(ids, list)
    return ids


def test_what_was_sampled_stays_however_it_was_split() -> None:
    form = form_of(FAMILIES["qwen2.5"])
    tokenizer = form.tokenizer
    conversation, context = opened(form, user("Hello?"))
    odd = [token for letter in "The capital" for token in plain(tokenizer, letter)]
    assert odd != plain(tokenizer, "The capital")
    end = plain(tokenizer, "<|im_end|>")
    extension = conversation.extend([*odd, *end], says("The capital"), [user("Go on.")])
    suffix = plain(tokenizer, "\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n")
    assert list(extension.ids) == [*context, *odd, *end, *suffix]


@pytest.mark.parametrize(
    ("name", "stop", "suffix"),
    [
        ("qwen2.5", "<|endoftext|>", "\n<|im_start|>user\nOn.<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen2.5", "", "<|im_end|>\n<|im_start|>user\nOn.<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3.1", "<|eom_id|>", "<|start_header_id|>user<|end_header_id|>\n\nOn.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma", "<eos>", "\n<start_of_turn>user\nOn.<end_of_turn>\n<start_of_turn>model\n"),
        ("gemma", "", "<end_of_turn>\n<start_of_turn>user\nOn.<end_of_turn>\n<start_of_turn>model\n"),
        ("phi3", "<|endoftext|>", "\n<|user|>\nOn.<|end|>\n<|assistant|>\n"),
        ("gpt-oss", "<|return|>", "<|start|>user<|message|>On.<|end|><|start|>assistant"),
        ("gpt-oss", "", "<|end|><|start|>user<|message|>On.<|end|><|start|>assistant"),
        ("glm4.5", "<|user|>", "\nOn.<|assistant|>"),
        ("glm4.5", "<|observation|>", "<|user|>\nOn.<|assistant|>"),
        ("glm4.5", "<|endoftext|>", "<|user|>\nOn.<|assistant|>"),
        ("glm4.5", "", "<|user|>\nOn.<|assistant|>"),
        ("mistral", "", "</s>[INST] On.[/INST]"),
    ],
)  # fmt: skip
def test_how_a_turn_ended(name: str, stop: str, suffix: str) -> None:
    form = form_of(FAMILIES[name])
    conversation, context = opened(form, user("Hello?"))
    sampled = [*plain(form.tokenizer, "Hi"), *plain(form.tokenizer, stop)]
    extension = conversation.extend(sampled, says("Hi"), [user("On.")])
    assert list(extension.ids) == [*context, *sampled, *plain(form.tokenizer, suffix)]


def test_a_stop_token_of_plain_text_is_followed_by_the_end_of_turn() -> None:
    family = FAMILIES["qwen2.5"]
    tokenizer = tokenizer_of(family)
    full_stop = plain(tokenizer, ".")
    form = ConversationFormat(tokenizer, [*stop_ids(tokenizer, family), *full_stop])
    conversation, context = opened(form, user("Hello."))
    sampled = [*plain(tokenizer, "Hi"), *full_stop]
    extension = conversation.extend(sampled, says("Hi."), [user("On.")])
    suffix = plain(tokenizer, "<|im_end|>\n<|im_start|>user\nOn.<|im_end|>\n<|im_start|>assistant\n")
    assert list(extension.ids) == [*context, *sampled, *suffix]


THOUGHT = "<think>\nhm\n</think>\n\nHi"


def test_a_template_that_drops_reasoning_begins_a_segment_with_the_whole_rendering() -> None:
    form = form_of(FAMILIES["qwen3"])
    tokenizer = form.tokenizer
    conversation, _ = opened(form, user("Hello?"))
    extension = conversation.extend(plain(tokenizer, THOUGHT + "<|im_end|>"), says(THOUGHT), [user("On.")])
    messages = [user("Hello?"), says(THOUGHT), user("On.")]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert extension.new_segment
    assert list(extension.ids) == list(whole)
    assert "hm" not in tokenizer.decode(whole)
    # and goes on from there
    sampled = plain(tokenizer, "So<|im_end|>")
    after = conversation.extend(sampled, says("So"), [user("And?")])
    assert not after.new_segment
    assert list(after.ids)[: len(whole) + len(sampled)] == [*whole, *sampled]


def test_reasoning_before_a_tool_call_is_kept_until_the_user_speaks_again() -> None:
    form = form_of(FAMILIES["qwen3"])
    tokenizer = form.tokenizer
    conversation, context = opened(form, user("1+2?"), tools=TOOLS)
    thinks = {**calls(1), "content": "<think>\nadd\n</think>"}
    call = (
        '<think>\nadd\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
    )
    first = conversation.extend(plain(tokenizer, call), thinks, [result(1)])
    assert not first.new_segment
    assert list(first.ids)[: len(context)] == context
    answered = conversation.extend(plain(tokenizer, THOUGHT + "<|im_end|>"), says(THOUGHT), [user("And 2+2?")])
    assert answered.new_segment
    assert "add\n</think>" not in str(tokenizer.decode(answered.ids))


def test_kept_turns_stay_as_they_were_sampled() -> None:
    form = form_of(FAMILIES["qwen3"], rewritten="keep")
    tokenizer = form.tokenizer
    conversation, context = opened(form, user("Hello?"))
    sampled = plain(tokenizer, THOUGHT + "<|im_end|>")
    extension = conversation.extend(sampled, says(THOUGHT), [user("On.")])
    suffix = plain(tokenizer, "\n<|im_start|>user\nOn.<|im_end|>\n<|im_start|>assistant\n")
    assert not extension.new_segment
    assert list(extension.ids) == [*context, *sampled, *suffix]


@pytest.mark.parametrize(
    ("name", "kwargs", "turn"),
    [
        ("qwen3", {}, THOUGHT),
        ("qwen3", {"enable_thinking": False}, "Hi"),  # the generation prompt closes the reasoning, the history has none
        ("qwen3.5-think", {}, "hm\n</think>\n\nHi"),
        ("deepseek-r1", {}, "hm\n</think>\n\nHi"),
        ("deepseek-r1", {}, "Hi"),
    ],
)
def test_rewriting_is_refused_by_name(name: str, kwargs: dict[str, Any], turn: str) -> None:
    form = form_of(FAMILIES[name], rewritten="error", chat=ChatOptions(kwargs))
    conversation, context = opened(form, user("Hello?"))
    sampled = plain(form.tokenizer, turn + FAMILIES[name].end)
    with pytest.raises(ValueError, match=r"environment\.rewritten=error.*=segment"):
        conversation.extend(sampled, says(turn), [user("On.")])
    assert conversation.ids == context


def test_tools_that_move_to_the_last_user_turn_are_a_rewritten_history() -> None:
    form = form_of(FAMILIES["mistral"])
    conversation, _ = opened(form, user("Hello?"), tools=TOOLS)
    assert conversation.extend(plain(form.tokenizer, " Hi</s>"), says("Hi"), [user("On.")]).new_segment


def test_a_date_that_changes_is_a_rewritten_history() -> None:
    tokenizer = tokenizer_kinds.tokenizer_of("byte_level_split", "dated")
    tokenizer.chat_template = str(tokenizer.chat_template).replace("strftime_now('%d %b %Y')", "day")
    options = {"day": "Monday"}
    form = ConversationFormat(tokenizer, chat=ChatOptions(options))
    conversation, _ = opened(form, user("Hello?"))
    conversation._options["day"] = "Tuesday"
    extension = conversation.extend(plain(tokenizer, "Hi<|eot|>"), says("Hi"), [user("On.")])
    assert extension.new_segment
    assert "Today is Tuesday" in str(tokenizer.decode(extension.ids))


def test_a_default_system_prompt_is_not_written_twice() -> None:
    form = form_of(FAMILIES["qwen2.5"])
    conversation, _ = opened(form, user("Hello?"))
    extension = conversation.extend(plain(form.tokenizer, "Hi<|im_end|>"), says("Hi"), [user("On.")])
    assert str(form.tokenizer.decode(extension.ids)).count("<|im_start|>system") == 1


@pytest.mark.parametrize("kind", list(tokenizer_kinds.KINDS))
def test_a_turn_cut_off_before_plain_text_is_proven_or_refused(kind: str) -> None:
    """The template goes on with "\\n\\n### Instruction:", which merges with some ends of a turn."""
    tokenizer = tokenizer_kinds.tokenizer_of(kind, "instruction")
    form = ConversationFormat(tokenizer)
    goes_on = "\n\n### Instruction:\nOn.\n\n### Response:\n"
    asked = str(tokenizer.apply_chat_template([user("Hello?")], add_generation_prompt=True, tokenize=False))
    accepted = 0
    for text in ("Hi", "Hi\n", "Hi ", "Hi ###"):
        conversation, context = opened(form, user("Hello?"))
        sampled = encode_continuation(tokenizer, text)
        whole = plain(tokenizer, asked + text + goes_on)
        try:
            extension = conversation.extend(sampled, says(text), [user("On.")])
        except TemplateError as error:
            assert "cut off without a stop token" in str(error)  # noqa: PT017
            assert whole[: len(context) + len(sampled)] != [*context, *sampled]
            continue
        accepted += 1
        assert list(extension.ids)[: len(context) + len(sampled)] == [*context, *sampled]
        if kind == "unigram":  # several encodings are equally likely, and which is taken depends on the place
            assert tokenizer.decode(extension.ids) == tokenizer.decode(whole)
        else:
            assert list(extension.ids) == whole
    assert accepted
    ended = plain(tokenizer, "Hi</s>")
    conversation, context = opened(form, user("Hello?"))
    extension = conversation.extend(ended, says("Hi"), [user("On.")])
    assert list(extension.ids) == [*context, *plain(tokenizer, f"Hi</s>{goes_on}")]


def test_a_template_without_tools_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"environment\.target: the environment has tools.*data\.chat_template"):
        form_of(FAMILIES["phi3"]).check_tools()


def test_no_chat_template_is_refused_by_name() -> None:
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"data\.chat_template=FILE"):
        ConversationFormat(tokenizer)


def test_messages_that_the_template_refuses_leave_the_conversation_as_it_was() -> None:
    form = form_of(FAMILIES["gemma"])
    conversation, context = opened(form, user("Hello?"))
    with pytest.raises(TemplateError, match="must alternate"):
        conversation.extend(plain(form.tokenizer, "Hi<end_of_turn>"), says("Hi"), [user("On."), user("On.")])
    assert conversation.ids == context
    assert conversation.messages == [user("Hello?")]


def test_the_first_context() -> None:
    form = form_of(FAMILIES["qwen3"], chat=ChatOptions({"enable_thinking": False}, system_prompt="Be brief."))
    conversation = Conversation(form)
    ids = conversation.open(
        prompt_messages({"prompt": "Hello?"}), None, {"chat_template_kwargs": {"enable_thinking": True}}
    )
    messages = [{"role": "system", "content": "Be brief."}, user("Hello?")]
    assert list(ids) == list(
        form.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    )
    assert prompt_messages({"messages": messages}) == messages
    assert prompt_messages({"answer": "3"}) == []
