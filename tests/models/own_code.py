"""A small checkpoint whose model class is in Python files of its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGURATION = """
from transformers import LlamaConfig


class DampedConfig(LlamaConfig):
    model_type = "damped"

    def __init__(self, damping=1.0, **rest):
        super().__init__(**rest)
        self.damping = damping
"""
_MODEL = """
class DampedModel(LlamaModel):
    config_class = DampedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(DampedLayer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()


class DampedForCausalLM(LlamaForCausalLM):
    config_class = DampedConfig
    _no_split_modules = ["DampedLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.model = DampedModel(config)
        self.post_init()
"""
"""What both have after their layer, `DampedLayer`."""
MODELING = (
    '''
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from .configuration_damped import DampedConfig


class DampedLayer(LlamaDecoderLayer):
    """What a layer adds is less than a Llama layer's."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.damping = config.damping

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.damping * (super().forward(hidden_states, *args, **kwargs) - hidden_states)

'''
    + _MODEL
)
SCALAR = MODELING.replace("from torch import nn", "import torch\nfrom torch import nn").replace(
    "self.damping = config.damping", "self.damping = nn.Parameter(torch.tensor(config.damping))"
)
"""The damping is a parameter without dimensions."""
EXPERTS = (
    """
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP, LlamaModel

from .configuration_damped import DampedConfig


class Experts(nn.Module):
    # modules of their own, which run where a token chose them

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, 24)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(24))

    def forward(self, hidden_states):
        weight, chosen = self.router(hidden_states).softmax(-1).max(-1)
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.experts):
            rows = chosen == number
            if rows.any():
                out[rows] = expert(hidden_states[rows]) * weight[rows, None]
        return out


class DampedLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mlp = Experts(config)

"""
    + _MODEL
)
CONFIG: dict[str, Any] = {
    "architectures": ["DampedForCausalLM"],
    "model_type": "damped",
    "auto_map": {
        "AutoConfig": "configuration_damped.DampedConfig",
        "AutoModel": "modeling_damped.DampedModel",  # vLLM makes it
        "AutoModelForCausalLM": "modeling_damped.DampedForCausalLM",
    },
    "damping": 0.4,
    "vocab_size": 101,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}


def save_model(folder: Path, tokenizer: Path | None = None, modeling: str = MODELING) -> Any:
    """Write the checkpoint, with random weights and the tokenizer of another folder. Returns the model, as transformers loads it.

    Args:
        modeling: text of the file of the model's class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configuration_damped.py").write_text(CONFIGURATION)
    (folder / "modeling_damped.py").write_text(modeling)
    fields = dict(CONFIG)
    if tokenizer is not None:
        theirs = json.loads((tokenizer / "config.json").read_text())
        fields |= {key: theirs[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        for file in tokenizer.glob("*token*"):
            shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    made = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    save_file(made.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
