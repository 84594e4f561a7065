"""The roles of a job: that each is described, used and possible, with the model, tokenizer and ranks that it needs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from aligner.check.memory import Machine
from aligner.check.rollout import check_end
from aligner.config.models import errors_about
from aligner.config.schema import Config
from aligner.data.tokenizer import load_tokenizer
from aligner.models.read_spec import read_spec
from aligner.models.spec import Head, ModelSpec, with_scalar_head
from aligner.models.tensors import architecture_of, classifier_of
from aligner.reward.components import ResolvedComponent, reward_components
from aligner.rollout.engines import backend
from aligner.spmd.mesh import Mesh
from aligner.spmd.placement import RANKS_THAT_WORK, Placement
from aligner.spmd.role_table import REWARD_MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def wanted_roles(config: Config, listed: Sequence[str]) -> list[str]:
    """The roles of a job: those of algorithm.roles, and the further models that components of the reward name."""
    if "reward" not in listed or not config.models:
        return list(listed)
    named = [part.model for part in reward_components(config.reward) if part.model in config.models]
    return list(dict.fromkeys([*listed, *(name for name in named if name is not None)]))


def check_roles(config: Config, roles: Sequence[str]) -> None:
    """Raises ValueError for a role that is not described, a job without anything to train, and a model that nobody uses."""
    others = [name for name in config.roles if name != "policy"]
    unknown = [role for role in roles if role not in config.roles]
    if unknown or not {"policy", "reward_model"} & set(roles):
        more = f" (a further model is models.{unknown[0]}={{kind: ..., path: ...}})" if unknown else ""
        raise ValueError(
            f"algorithm.roles={list(roles)} must hold policy (or reward_model, to train that alone), and otherwise only "
            f"{', '.join(others)}{more}."
        )
    if "rollout" in roles and "policy" not in roles:
        raise ValueError(f"algorithm.roles={list(roles)}: rollout takes its weights from the policy; add policy.")
    for role in (config.role(name) for name in config.models if name not in roles):
        component = (
            f", name it in a component of the reward (reward.components.X.model={role.name})"
            if role.kind is REWARD_MODEL
            else ""
        )
        raise ValueError(
            f"{role.section} is a model that nobody uses: add {role.name} to algorithm.roles={list(roles)}{component}, or leave it out."
        )


def model_of(config: Config, role: str) -> ModelSpec:
    """The model of a role, with the head that the role needs."""
    setting, path = config.model_path(role)
    spec = read_spec(path, config.model.trust_remote_code)
    if config.role(role).kind.head == "scalar":
        return with_scalar_head(spec)
    if spec.head is Head.SCALAR:
        raise ValueError(
            f"{setting}={path} is a {classifier_of(spec)}, which has no output layer over the vocabulary; "
            f"the role {role} needs a {architecture_of(spec)}."
        )
    return spec


def check_tokenizers(config: Config, roles: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Every model reads the same token ids, so the ids must mean the same; but for engines with tokenizers of their own."""
    for role in (role for role in roles if config.role(role).kind.head):
        setting, path = config.model_path(role)
        if setting == "model.path" or getattr(config.settings(role), "own_tokenizer", False):
            continue
        ours, others = tokenizer.get_vocab(), load_tokenizer(path, setting).get_vocab()
        differing = sorted(token for token in ours.keys() | others.keys() if ours.get(token) != others.get(token))
        if differing:
            token = differing[0]
            raise ValueError(
                f"{setting}={path} has another tokenizer than model.path={config.model.path}: {len(differing)} token(s) "
                f"differ, such as {token!r} (id {others.get(token)} against {ours.get(token)}); use a model of the same "
                "tokenizer"
                + (
                    f", or set {config.role(role).section}.own_tokenizer=true where the loop makes its prompts with its own."
                    if config.role(role).kind.runs_on == "engine"
                    else "."
                )
            )


def check_ranks(placement: Placement) -> None:
    """The form of every `ranks`; what they name is checked where they become meshes."""
    for role, layout in placement.items():
        ranks = layout.ranks
        if isinstance(ranks, tuple) and all(type(rank) is int for rank in ranks):
            continue
        if type(ranks) not in (str, int):
            raise ValueError(
                f"placement.{role}.ranks={list(ranks) if isinstance(ranks, tuple) else ranks} is not understood; use all, "
                f"{RANKS_THAT_WORK}."
            )


def check_engines(config: Config, specs: Mapping[str, ModelSpec], meshes: Mapping[str, Mesh], machine: Machine) -> None:
    """Further engines: what they can run, and that two of one process can be there together."""
    engines = [role for role in specs if config.role(role).kind.runs_on == "engine"]
    for role in (config.role(name) for name in engines if name in config.models):
        mesh, spec, settings = meshes[role.name], specs[role.name], config.settings(role.name)
        if not settings.own_tokenizer:  # else the loop says what ends its answers
            check_end(config, spec, load_tokenizer(settings.path))
        with errors_about(role, "rollout"):
            backend(settings.engine).check(spec, mesh, settings, machine.cpu)
    for one, other in itertools.combinations(engines, 2):
        shared = sorted({*meshes[one].ranks} & {*meshes[other].ranks})
        if shared and not machine.cpu and config.residency.mode != "off":
            raise ValueError(
                f"the engines {one} and {other} share rank {shared[0]}, and on a GPU only one engine of a process can give "
                f"up its memory to other roles; give {other} ranks of its own (placement.{other}.ranks), or set "
                "residency.mode=off."
            )


def check_scorer(config: Config, part: ResolvedComponent, roles: Sequence[str]) -> None:
    """A component's model is a reward model of this job."""
    name, able = part.model, [role.name for role in config.roles.values() if role.kind is REWARD_MODEL]
    if name is None:
        return
    if name not in able:
        given = (
            f"a {config.role(name).kind.name}, {config.role(name).kind.description}"
            if name in config.roles
            else "no role"
        )
        raise ValueError(
            f"{part.source} is {given}; use one of the reward models {', '.join(able)}, or define models.{name}="
            "{kind: reward_model, path: ...}."
        )
    if name not in roles:
        raise ValueError(f"{part.source} needs the role {name}; add it to algorithm.roles={list(roles)}.")
