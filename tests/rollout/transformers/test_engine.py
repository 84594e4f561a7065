"""The transformers engine against the library's own `generate` and full forward passes, over families, and against vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoConfig

from aligner.models.checkpoint import read_weights
from aligner.models.read_spec import read_spec
from aligner.rollout.config import RolloutConfig, Sampling
from aligner.rollout.transformers.engine import TransformersEngine
from aligner.rollout.vllm.engine import VllmEngine
from aligner.spmd.memory import Meter
from tests.rollout import tiny
from tools.family_models import write_model

Models = dict[str, tuple[Any, str]]
GREEDY = Sampling(temperature=0.0, max_tokens=24, stop_token_ids=())
DRAWN = Sampling(temperature=0.7, max_tokens=24, stop_token_ids=())
CPU = torch.device("cpu")
SEEDS = list(range(0, 600, 100))


def make(folder: str, model: Any, **settings: Any) -> TransformersEngine:
    config: RolloutConfig = replace(tiny.config("transformers"), **settings)
    engine = TransformersEngine(read_spec(folder), config, CPU)
    tiny.write(engine.weights, model)
    return engine


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.MORE_FAMILIES])
def test_tokens_of_generate_and_log_probabilities_of_a_full_forward_pass(family: str, models: Models) -> None:
    model, folder = models[family]
    engine = make(folder, model)
    asked = tiny.prompts(6)
    for prompt, (one,) in zip(asked, engine.generate(asked, [0] * 6, GREEDY), strict=True):
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, use_cache=True
        )
        assert one.tokens == tokens[0, len(prompt) :].tolist()
        assert tiny.gap(model, prompt, one) < 1e-5
    for prompt, (one,) in zip(asked, engine.generate(asked, SEEDS, DRAWN), strict=True):
        assert tiny.gap(model, prompt, one, 0.7) < 2e-5


def test_the_same_samples_as_vllms(start: Callable[..., VllmEngine], models: Models) -> None:
    """Whatever is drawn: seed and place decide the noise of both engines."""
    model, folder = models["qwen2"]
    other = start("qwen2")
    tiny.write(other.weights, model)
    engine = make(folder, model)
    for sampling in (GREEDY, DRAWN, replace(DRAWN, top_k=20, top_p=0.8), Sampling(temperature=2.0, max_tokens=80)):
        ours, theirs = (one.generate(tiny.prompts(6), SEEDS, sampling, 2) for one in (engine, other))
        for mine, his in zip((one for g in ours for one in g), (one for g in theirs for one in g), strict=True):
            assert mine.tokens == his.tokens
            assert (mine.ended, mine.truncated) == (his.ended, his.truncated)
            assert mine.logp == pytest.approx(his.logp, abs=1e-4)


@pytest.mark.parametrize("settings", [{"max_num_seqs": 3}, {"max_batched_tokens": 16, "max_num_seqs": 16}])
def test_a_queue_and_prompts_read_in_pieces_change_nothing(settings: dict[str, int], models: Models) -> None:
    model, folder = models["gemma3"]  # sliding windows of 6 tokens, and full attention
    asked = [[*prompt, *tiny.prompts(1, 9)[0] * 4] for prompt in tiny.prompts(8)]
    usual = make(folder, model).generate(asked, [100 * n for n in range(8)], DRAWN, 3)
    engine = make(folder, model, **settings)
    small = engine.generate(asked, [100 * n for n in range(8)], DRAWN, 3)
    for ours, others in zip(small, usual, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in others]
        assert all(a.logp == pytest.approx(b.logp, abs=2e-5) for a, b in zip(ours, others, strict=True))
    assert not engine.requests.under_way and not engine.requests.cache_bytes()


def test_samples_of_one_prompt_are_read_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = models["llama"]
    engine, rows = make(folder, model), []
    inner = engine.model.forward
    monkeypatch.setattr(
        engine.model, "forward", lambda **inputs: rows.append(inputs["input_ids"].shape) or inner(**inputs)
    )
    engine.generate(tiny.prompts(3), [0, 100, 200], Sampling(max_tokens=3, stop_token_ids=()), 5)
    assert rows == [(3, 6), (15, 1), (15, 1)]


def test_a_synced_engine_is_a_fresh_one_to_the_last_bit(models: Models) -> None:
    model, folder = models["qwen3_moe"]
    other = tiny.make_model("qwen3_moe", 77)
    engine = make(folder, other)
    before = engine.generate(tiny.prompts(6), SEEDS, DRAWN, 2)
    tiny.write(engine.weights, model)
    fresh = make(folder, model).generate(tiny.prompts(6), SEEDS, DRAWN, 2)
    assert engine.generate(tiny.prompts(6), SEEDS, DRAWN, 2) == fresh != before


def test_regions_are_counted(models: Models) -> None:
    model, folder = models["mixtral"]
    engine = make(folder, model)
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(RuntimeError, match=rf"16384 of 16384 elements of {name} were not written"):
        tiny.write(engine.weights, model, skip=name)
    with pytest.raises(RuntimeError, match="the last sync did not finish"):
        engine.generate([[5]], [0], GREEDY)
    piece = engine.weights.pieces()[0]
    engine.weights.written([piece])
    with pytest.raises(RuntimeError, match="was written twice"):
        engine.weights.written([piece])
    engine.weights.discard()
    tiny.write(engine.weights, model)
    assert engine.loaded.complete


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen3_moe"])
def test_what_is_given_up_is_gone_and_comes_back_with_the_next_transfer(family: str, models: Models) -> None:
    model, folder = models[family]
    engine = make(folder, model)
    parts = engine.parts(Meter(CPU))
    first = engine.generate(tiny.prompts(6), SEEDS, DRAWN)
    assert parts["weights"].bytes() == sum(t.nbytes for t in model.parameters())
    for part in parts.values():
        part.evict()
    assert sum(t.untyped_storage().nbytes() for t in engine.model.parameters()) == 0
    with pytest.raises(RuntimeError, match="has no weights: they were given up"):
        engine.generate(tiny.prompts(6), SEEDS, DRAWN)
    for part in parts.values():
        part.bring()
    tiny.write(engine.weights, model)
    assert engine.generate(tiny.prompts(6), SEEDS, DRAWN) == first


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, models: Models) -> None:
    model, folder = models["llama"]
    engine = make(folder, model, dtype=dtype)
    half = tiny.make_model("llama", 0).to(getattr(torch, dtype))
    half.load_state_dict(model.state_dict())
    for prompt, (one,) in zip(tiny.prompts(4), engine.generate(tiny.prompts(4), SEEDS[:4], DRAWN), strict=True):
        assert tiny.gap(half, prompt, one, 0.7) < (0.15 if dtype == "bfloat16" else 0.03)


def loaded(folder: Path, **settings: Any) -> TransformersEngine:
    """An engine with the weights of a folder."""
    spec = read_spec(folder)
    engine = TransformersEngine(spec, replace(tiny.config("transformers"), **settings), CPU)
    read_weights(spec, engine.weights)
    return engine


def test_rows_of_a_batch_need_no_more_columns_than_positions(tmp_path: Path) -> None:
    """A long prompt, and a short one with a long response: GPT-Neo's mask is of its positions."""
    sizes = {"hidden_size": 64, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    config = GPTNeoConfig(**sizes, **ends, vocab_size=tiny.VOCAB, max_position_embeddings=128, window_size=6)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    engine = loaded(tmp_path, max_model_len=128)
    asked = [(tiny.prompts(1, 9)[0] * 25, replace(DRAWN, max_tokens=20)), ([5, 9, 7], replace(DRAWN, max_tokens=120))]
    alone = [engine.generate([prompt], [100], sampling)[0][0] for prompt, sampling in asked]
    tickets = [engine.start([prompt], [100], sampling) for prompt, sampling in asked]
    for ticket, one in zip(tickets, alone, strict=True):
        (together,) = engine.finish(ticket)
        assert together.tokens == one.tokens and together.logp == pytest.approx(one.logp, abs=2e-5)


def test_states_of_linear_attention_are_counted_and_read_anew(tmp_path: Path) -> None:
    """Also those of a row that is left over of a batch, with padding before it."""
    write_model("qwen3_next", tmp_path)
    engine = loaded(tmp_path)
    short, long = [5, 9, 7], tiny.prompts(1, 9)[0] * 6
    (alone,), (other,) = (engine.generate([one], [100], DRAWN)[0] for one in (short, long))
    tickets = [engine.start([one], [100], replace(DRAWN, max_tokens=n)) for one, n in ((short, 24), (long, 6))]
    assert engine.finish(tickets[1])[0].tokens == other.tokens[:6]
    kept = engine.requests.cache_bytes()
    states = engine.model.config.linear_num_value_heads * 32 * 32 * 4  # of one layer and one row, float32
    assert kept > states
    engine.new_weights()
    (one,) = engine.finish(tickets[0])
    assert one.tokens == alone.tokens and one.logp == pytest.approx(alone.logp, abs=1e-4)


def test_what_transformers_keeps_in_float32_is_kept(tmp_path: Path) -> None:
    """As from_pretrained does: DeepSeek-V3's correction of its router decides which experts are taken."""
    write_model("deepseek_v3", tmp_path)
    engine = loaded(tmp_path, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert engine.storages[name].dtype is torch.float32 and engine.storages["lm_head.weight"].dtype is torch.bfloat16
    assert all(torch.equal(value, held[storage]) for storage, value in engine.storages.items())
    for prompt, (one,) in zip(tiny.prompts(4), engine.generate(tiny.prompts(4), SEEDS[:4], DRAWN), strict=True):
        assert tiny.gap(model, prompt, one, 0.7) < 0.15


def test_random_states_of_the_process_are_left_alone(models: Models) -> None:
    model, folder = models["qwen2"]
    before = torch.get_rng_state()
    make(folder, model).generate(tiny.prompts(2), [0, 100], DRAWN)
    assert torch.equal(torch.get_rng_state(), before)
