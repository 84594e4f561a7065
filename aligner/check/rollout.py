"""How long samples can become, and which tokens end them: settled before a model is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aligner.config.schema import Config
from aligner.data.end_tokens import EndTokens, find_ends, special_among
from aligner.data.prompts import Prompt
from aligner.data.sets import DataSets
from aligner.data.tokenized_answer import TokenizedAnswer
from aligner.models.spec import ModelSpec
from aligner.rollout.config import ALONE, BESIDE_OTHERS, UNSAID_LENGTH, WHILE_OTHERS_LEAVE, RolloutConfig
from aligner.spmd.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def memory_share(config: Config, role: str, meshes: Mapping[str, Mesh]) -> float:
    """rollout.gpu_memory_utilization, or what roles on the engine's ranks leave it.

    Args:
        meshes: of the roles that have a model.
    """
    given: float | None = config.settings(role).gpu_memory_utilization
    if given is not None:
        return given
    ranks = set(meshes[role].ranks)
    others = [name for name, mesh in meshes.items() if name != role and ranks & set(mesh.ranks)]
    kept = {name.partition(".")[0] for name in config.residency.keep}
    if not others:
        return ALONE
    return BESIDE_OTHERS if config.residency.mode == "off" or kept & {role, *others} else WHILE_OTHERS_LEAVE


def sized(config: Config, specs: Mapping[str, ModelSpec], meshes: Mapping[str, Mesh]) -> RolloutConfig:
    """The rollout's settings with a share of a GPU's memory and a length: rollout.max_model_len, or what prompts and responses
    need, as far as every model that reads samples has positions."""
    if "rollout" not in specs:
        return config.rollout
    of_models = {name: meshes[name] for name in specs}
    rollout = replace(config.rollout, gpu_memory_utilization=memory_share(config, "rollout", of_models))
    if rollout.max_model_len is not None:
        return rollout
    needed = config.data.max_prompt_tokens + config.sampling.max_tokens
    if config.environment.enabled:
        needed = config.environment.max_tokens or episode_tokens(config)
    engines = [name for name in config.models if config.role(name).kind.runs_on == "engine"]  # read what a loop asks
    positions = [spec.max_positions for name, spec in specs.items() if name not in engines]
    return replace(rollout, max_model_len=min(needed, *positions))


def episode_tokens(config: Config) -> int:
    """Tokens of a task with all turns at their limit: what an episode may have where nothing says how long it may become."""
    return config.data.max_prompt_tokens + config.environment.max_turns * config.sampling.max_tokens


def sized_engines(config: Config, specs: Mapping[str, ModelSpec], meshes: Mapping[str, Mesh]) -> dict[str, Any]:
    """The settings of further models, in which engines have a share of memory and a length: their max_model_len, or what a
    policy's rollout needs, at least the usual one, as far as the model has positions."""
    needed = max(config.data.max_prompt_tokens + config.sampling.max_tokens, UNSAID_LENGTH)
    of_models, models = {name: meshes[name] for name in specs}, dict(config.models)
    for name in (name for name in models if config.role(name).kind.runs_on == "engine" and name in specs):
        length = models[name].max_model_len or min(needed, specs[name].max_positions)
        share = memory_share(config, name, of_models)
        models[name] = replace(models[name], max_model_len=length, gpu_memory_utilization=share)
    return models


def answered_prompts(config: Config, data: DataSets) -> DataSets:
    """Without the prompts of held-out pairs that are too long to be answered in evaluations, where such are to be
    dropped; other prompts were measured when they were read."""
    kept = [prompt for prompt in data.heldout if len(prompt.tokens) <= config.data.max_prompt_tokens]
    if config.data.too_long != "drop" or len(kept) == len(data.heldout):
        return data
    left_out = data.heldout_left_out.copy()
    left_out["prompts too long to answer"] += len(data.heldout) - len(kept)
    return replace(data, heldout=kept, heldout_left_out=left_out)


def check_lengths(config: Config, data: DataSets, specs: Mapping[str, ModelSpec], given: int | None) -> None:
    """Prompts and their responses fit.

    Args:
        config: with the length that `sized` has found.
        given: rollout.max_model_len as it was set.

    Raises:
        ValueError: one does not; the settings are named with what would work.
    """
    longest = max((len(prompt.tokens) for prompt in data.heldout), default=0)
    asked, drawn = config.data.max_prompt_tokens, config.sampling.max_tokens
    if longest > asked:  # of held-out pairs; other prompts were checked when they were read
        raise ValueError(
            f"a held-out pair's prompt has {longest} tokens, and the role rollout answers it in evaluations; raise "
            f"data.max_prompt_tokens={asked} to {longest} or more, or set data.too_long=drop."
        )
    length = config.rollout.max_model_len
    assert length is not None, "sized() gives it a length"
    if asked + drawn <= length:
        return
    if given is not None:
        raise ValueError(
            f"data.max_prompt_tokens={asked} + sampling.max_tokens={drawn} is more than rollout.max_model_len={given}; "
            f"raise it to {asked + drawn}, or lower one of them."
        )
    longest = max([longest, *(len(prompt.tokens) for prompt in data.known if isinstance(prompt, Prompt))])
    if longest + drawn > length:
        least = min(specs.values(), key=lambda spec: spec.max_positions)
        shorter = [f"sampling.max_tokens={length - longest} or less"] if longest < length else []
        shorter += [f"data.max_prompt_tokens={length - drawn} with data.too_long=drop"] if drawn < length else []
        raise ValueError(
            f"the longest prompt has {longest} tokens, which with sampling.max_tokens={drawn} is more than the "
            f"{least.positions_text}; use {' or '.join(shorter)}."
        )


def check_environment(config: Config, roles: Sequence[str]) -> None:
    """An environment has somebody to play in it, and its episodes fit in the engine.

    Args:
        config: with the length that `sized` has found.

    Raises:
        ValueError: it has not, or they do not; the settings are named with what would work.
    """
    environment, length = config.environment, config.rollout.max_model_len
    if not environment.enabled:
        return
    program = environment.agent.command
    named = f"environment.agent.command={program!r}" if program else f"environment.target={environment.target}"
    if "rollout" not in roles:
        raise ValueError(
            f"{named} is played by the role rollout; add it to algorithm.roles={list(roles)}, or leave it out."
        )
    if config.data.kind != "prompts":
        raise ValueError(
            f"{named} plays the rows of data.kind=prompts, and this job has {config.data.kind}; leave it out."
        )
    most = environment.max_tokens
    if most is None:
        return
    if length is not None and most > length:
        raise ValueError(
            f"environment.max_tokens={most} is more than rollout.max_model_len={length}, which holds the longest context of an "
            f"episode with its turn; use {length} or less, or raise that to {most}, as far as the models have positions."
        )
    asked, drawn = config.data.max_prompt_tokens, config.sampling.max_tokens
    if asked + drawn > most:
        raise ValueError(
            f"data.max_prompt_tokens={asked} + sampling.max_tokens={drawn}, a task and its first turn, is more than "
            f"environment.max_tokens={most}; raise it to {asked + drawn} or more, or lower one of them."
        )


def check_end(config: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without an end token every response would run to its limit.

    Raises:
        ValueError: there is none, or one that the model does not have.
    """
    given = config.sampling.stop_token_ids
    if given is None and not spec.eos_token_ids:
        raise ValueError(
            f"{spec.path}/config.json has no eos_token_id, so responses would never end; set it, or "
            f"sampling.stop_token_ids=[{tokenizer.eos_token_id}] (the tokenizer's {tokenizer.eos_token})."
        )
    beyond = [token for token in given or () if token >= spec.vocab]
    if beyond:
        raise ValueError(
            f"sampling.stop_token_ids={list(given or ())} holds {beyond[0]}, and the model in {spec.path} has the tokens "
            f"0 to {spec.vocab - 1}; use ids of its tokenizer."
        )


def ends_of(config: Config, tokenizer: PreTrainedTokenizerBase, data: DataSets) -> EndTokens:
    """What ends a turn of the model that is trained, with what its training data say."""
    answers: list[TokenizedAnswer] = []
    for row in data.known:
        if isinstance(row, TokenizedAnswer):
            answers.append(row)
        elif not isinstance(row, Prompt):
            answers += [row.chosen, row.rejected]
    return find_ends(config.model.path, tokenizer, answers, config.data.train_on == "all")


def with_ends(spec: ModelSpec, config: Config, ends: EndTokens, tokenizer: PreTrainedTokenizerBase) -> ModelSpec:
    """The model as it will be trained: responses end at these, and its exports name them, with the chat template of
    data.chat_template. What sampling.stop_token_ids
    adds is trained on as well, and is exported where it is a special token."""
    chosen: Sequence[int] = config.sampling.stop_token_ids or ()
    end_tokens = dict.fromkeys([*spec.eos_token_ids, *ends.ids, *special_among(tokenizer, chosen)])
    template = tokenizer.chat_template if config.data.chat_template is not None else None
    return replace(spec, eos_token_ids=tuple(end_tokens), chat_template=template)


def shown_ends(config: Config, ends: EndTokens) -> str:
    """What ends responses, for people."""
    given = config.sampling.stop_token_ids
    if given is None:
        return f"turns end with {ends.shown(ends.ids)}"
    text = f"responses end with sampling.stop_token_ids={list(given)} alone"
    left_out = [token for token in ends.ids if token not in given]
    return f"{text}, and not with {ends.shown(left_out)}" if left_out else text
