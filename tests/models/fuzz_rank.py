"""Each mutated config.json either refused by name, or a model whose logits are transformers', read alike by vLLM.

Arguments: a folder to work in, "sample" or "all", and the families. A line of JSON for each mutation.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import torch.distributed as dist
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
from aligner.trainer.megatron import cpu as cpu_megatron
from aligner.trainer.megatron.groups import make_groups, prepare_megatron
from aligner.trainer.megatron.model import build_model
from aligner.trainer.megatron.sizes import check_runs
from aligner.trainer.packing import pack
from tests.models.mutations import ABSENT, Change, changes, save

TOKENS_BT = torch.randint(3, 61, (2, 48), generator=torch.Generator().manual_seed(3))
LIMIT = 1e-4
"""Of logits up to about 30."""
SAMPLED = 16
"""Every so many of the mutations are the sample."""


class Fuzz:
    def __init__(self, world: World) -> None:
        self.mesh = Mesh((0,), name="policy")
        cpu_megatron.install()
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
        packed = pack(TOKENS_BT, torch.tensor([TOKENS_BT.shape[1]] * len(TOKENS_BT)), 1, torch.device("cpu"))
        made.rotary.positions_T = packed.positions_T
        out = made.chunks[0](packed.tokens_T[None], packed.positions_T[None], packed.lengths)
        return out[0][:, : spec.vocab].view(*TOKENS_BT.shape, -1)

    def outcome(self, folder: Path, change: Change) -> tuple[str, str]:
        """("refused", why), ("equal", how nearly) or ("fault", what)."""
        try:
            spec = read_spec(folder)
            check_reading(spec)
            check_runs(spec, self.mesh, False, cpu=True)
            check_weights(spec)
        except ValueError as error:
            said = [*change, *(str(*value) for value in change.values() if isinstance(value, list) and len(value) == 1)]
            said += ["config.json says", "has no tensor", "does not declare"]  # of the files' tensors
            by_name = any(words in str(error) for words in said)
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


def main() -> None:
    work, which, *families = sys.argv[1:]
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    world = World(100)
    fuzz = Fuzz(world)
    for shift, family in enumerate(families):
        base = Path(work).resolve() / family
        save(family, base)
        wanted = changes(family, json.loads((base / "config.json").read_text()))
        for number, change in enumerate(itertools.islice(wanted, shift, None, SAMPLED if which == "sample" else 1)):
            folder = Path(work).resolve() / f"{family}-{number}"
            write(base, folder, change)
            found, why = fuzz.outcome(folder, change)
            print(json.dumps({"family": family, "change": change, "outcome": found, "why": why}), flush=True)
    assert dist.is_initialized()
    world.leave()


if __name__ == "__main__":
    main()
