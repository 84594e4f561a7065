"""What a rank does in the tests of config.json: each mutation is refused by name, or trains as transformers' model and is read
alike by vLLM."""

from __future__ import annotations

import functools
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from aligner.models.agreement import check_agreement, check_reading
from aligner.models.checkpoint import read_into
from aligner.models.read_spec import read_spec
from aligner.models.spec import ModelSpec
from aligner.models.verify_checkpoint import check_weights
from aligner.spmd.mesh import Mesh
from aligner.spmd.world import World
from aligner.trainer.megatron.cpu import install
from aligner.trainer.megatron.groups import make_groups, prepare_megatron
from aligner.trainer.megatron.model import build_model
from aligner.trainer.megatron.sizes import check_runs
from aligner.trainer.packing import pack
from aligner.trainer.row_contexts import whole_rows
from tests.models.mutations import ABSENT, Change, changes, save

TOKENS_BT = torch.randint(3, 61, (2, 48), generator=torch.Generator().manual_seed(3))
LIMIT = 1e-4
"""Of logits up to about 30."""


class Fuzz:
    """One rank that trains, and vLLM's reader."""

    def __init__(self, world: World) -> None:
        transformers.logging.set_verbosity(logging.CRITICAL)
        transformers.logging.disable_progress_bar()
        logging.disable(logging.WARNING)
        self.mesh = Mesh((0,), name="policy")
        install()
        prepare_megatron()
        self.groups = make_groups(world, self.mesh)
        from vllm.transformers_utils.config import get_config

        self.engine_reads = get_config

    @torch.no_grad()
    def trained(self, spec: ModelSpec) -> Tensor:
        """[B, T, V] logits of the training model."""
        made = build_model(spec, self.mesh, 0, self.groups, torch.device("cpu"), "float32", False)
        read_into(spec, made.pieces(), made.view)
        made.train(False)
        lengths = torch.tensor([TOKENS_BT.shape[1]] * len(TOKENS_BT))
        packed = pack(TOKENS_BT, whole_rows(lengths), 1, torch.device("cpu"))
        made.rotary.positions_T = packed.positions_T
        hidden_TH = made.chunks[0](packed.tokens_T[None], packed.positions_T[None], packed.segments_S2)[0]
        logits_TV = hidden_TH @ made.output_weight[: spec.vocab].T
        return logits_TV.view(*TOKENS_BT.shape, -1)

    def outcome(self, folder: Path, change: Change) -> tuple[str, str]:
        """("refused", why), ("equal", how nearly) or ("fault", what)."""
        try:
            spec = read_spec(folder)
            check_reading(spec)
            check_runs(spec, self.mesh, False, cpu=True)
            check_weights(spec)
        except ValueError as error:
            names = [
                *change,
                *(str(*value) for value in change.values() if isinstance(value, list) and len(value) == 1),
            ]
            names += ["config.json says", "has no tensor", "does not declare"]  # of the files' tensors
            by_name = any(words in str(error) for words in names)
            return ("refused" if by_name else "fault", str(error))
        except Exception as error:
            return "fault", f"reading: {error!r}"
        try:
            with torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, attn_implementation="eager"
                ).eval()
                expected = model(TOKENS_BT, use_cache=False, return_dict=True).logits
            engine = self.engine_reads(folder, trust_remote_code=False, config_format="hf")
            check_agreement(spec, engine, "the rollout engine")
            off = (self.trained(spec) - expected).abs().max().item()
        except Exception as error:
            return "fault", f"accepted, then {error!r}"
        return ("equal" if off < LIMIT else "fault", f"{off:.1e}")


def write(base: Path, folder: Path, change: Change) -> None:
    """The model in `base` with another configuration; its weights are the same files."""
    folder.mkdir()
    config: dict[str, Any] = json.loads((base / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if not (isinstance(value, str) and value == ABSENT)}
    (folder / "config.json").write_text(json.dumps(config))
    for file in base.glob("*.safetensors"):
        (folder / file.name).symlink_to(file)


@functools.cache
def fuzz_of(world: World) -> Fuzz:
    return Fuzz(world)


def outcomes(world: World, work: Path, family: str, start: int, step: int) -> list[dict[str, Any]]:
    """Of every `step`-th mutation from `start` on: the change, and "refused", "equal" or "fault" with why.

    Args:
        work: a folder for the configurations.
    """
    base = work / family
    save(family, base)
    wanted = changes(family, json.loads((base / "config.json").read_text()))
    rows = []
    for number, change in enumerate(itertools.islice(wanted, start, None, step)):
        folder = work / f"{family}-{number}"
        write(base, folder, change)
        outcome, why = fuzz_of(world).outcome(folder, change)
        rows.append({"change": change, "outcome": outcome, "why": why})
    return rows
