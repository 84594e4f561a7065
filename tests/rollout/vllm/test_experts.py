"""Fused experts: re-laid out and proven one by one; whatever is not what was written is detected and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from tests.rollout import tiny

MOE = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make_model("qwen3_moe", 40)


@pytest.fixture(scope="module")
def engine(model: Any, tmp_path_factory: pytest.TempPathFactory, group: dist.ProcessGroup) -> Iterator[VllmEngine]:
    """Shared: each test writes all weights anew."""
    folder = tiny.save(model, tmp_path_factory.mktemp("qwen3_moe"))
    made = VllmEngine(folder, group, "test", tiny.CONFIG, torch.device("cpu"))
    yield made
    made.close()


@pytest.fixture
def repack(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], None]], None]:
    """repack(change): from here on packing calls `change(layer)` on the plain experts first."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    pack = CPUUnquantizedExperts.process_weights_after_loading

    def install(change: Callable[[Any], None]) -> None:
        def changed(self: Any, layer: Any) -> None:
            # What was written stays as it is; the engine packs something else.
            for name in ("w13_weight", "w2_weight"):
                layer._parameters[name] = torch.nn.Parameter(layer._parameters[name].clone(), requires_grad=False)
            change(layer)
            pack(self, layer)

        monkeypatch.setattr(CPUUnquantizedExperts, "process_weights_after_loading", changed)

    return install


def expect(engine: VllmEngine, model: Any, message: str) -> None:
    weights = EngineWeights(engine)
    with pytest.raises(RuntimeError, match=message):
        tiny.write(weights, model)
    assert not engine.loaded.complete


def test_pieces_of_fused_experts(engine: VllmEngine, model: Any) -> None:
    weights = EngineWeights(engine)
    pieces = {p.name: p for p in weights.pieces()}
    # w13 is experts x 2 * 80 x 128, gate above up; w2 is experts x 128 x 80. Layer 0 is dense.
    up, down = (pieces[f"{MOE}.2.{part}_proj.weight"] for part in ("up", "down"))
    assert (up.storage, up.offset, up.stride) == (f"{MOE}.routed_experts:w13_weight", (2 * 160 + 80) * 128, (128, 1))
    assert (down.storage, down.offset, down.stride) == (f"{MOE}.routed_experts:w2_weight", 2 * 128 * 80, (80, 1))
    assert pieces["model.layers.1.mlp.gate.weight"].storage == "model.layers.1.mlp.gate:weight"
    assert pieces["model.layers.0.mlp.up_proj.weight"].storage == "model.layers.0.mlp.gate_up_proj:weight"


def test_the_width_is_padded_with_zeros_that_stay_zero(engine: VllmEngine, model: Any) -> None:
    weights = EngineWeights(engine)
    layer: Any = dict(engine.model.named_modules())[f"{MOE}.routed_experts"]
    for seed in (1, 2):
        torch.manual_seed(seed)
        tiny.randomize(model)
        tiny.write(weights, model)
        assert (layer.w13_weight.shape, layer.w2_weight.shape) == ((5, 192, 128), (5, 128, 96))  # 80 -> 96
        # Packing moves elements about: as many are zero as the padding has.
        assert int((layer.w13_weight == 0).sum()) == 5 * 32 * 128
        assert int((layer.w2_weight == 0).sum()) == 5 * 128 * 16


def test_two_experts_that_are_swapped(engine: VllmEngine, model: Any, repack: Callable[..., None]) -> None:
    def swap(layer: Any) -> None:
        for weight in (layer.w13_weight.data, layer.w2_weight.data):
            weight[[1, 3]] = weight[[3, 1]]

    repack(swap)
    expect(engine, model, rf"packed kernel of {MOE}, expert 1, gate and up projection \(160 x 128\) does not hold what")


def test_a_stale_expert(engine: VllmEngine, model: Any, repack: Callable[..., None]) -> None:
    before = tiny.tensors(model)[f"{MOE}.4.down_proj.weight"].clone()
    model.model.layers[1].mlp.experts.down_proj.data[4] *= 1 + 2**-20  # as little as one small step

    def keep(layer: Any) -> None:
        layer.w2_weight.data[4] = before

    repack(keep)
    expect(engine, model, rf"{MOE}, expert 4, down projection \(128 x 80\)")


@pytest.mark.parametrize("round_", [0, 1])
def test_one_wrong_row(engine: VllmEngine, model: Any, repack: Callable[..., None], round_: int) -> None:
    weights = EngineWeights(engine)
    for _ in range(round_):
        tiny.write(weights, model)

    def garble(layer: Any) -> None:
        layer.w13_weight.data[2, 117] = layer.w13_weight.data[2, 118]

    repack(garble)
    with pytest.raises(RuntimeError, match=rf"{MOE}, expert 2, gate and up projection"):
        tiny.write(weights, model)


def test_padding_that_is_not_zero(engine: VllmEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    pad = CPUUnquantizedExperts._pad_moe_intermediate

    def dirty(self: Any, layer: Any) -> None:
        pad(self, layer)
        layer.w13_weight.data[3, 85, 7] = 1e-3

    monkeypatch.setattr(CPUUnquantizedExperts, "_pad_moe_intermediate", dirty)
    expect(engine, model, rf"{MOE}, expert 3, gate and up projection")


def test_packing_that_was_skipped(engine: VllmEngine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    monkeypatch.setattr(
        CPUUnquantizedExperts, "process_weights_after_loading", CPUUnquantizedExperts._pad_moe_intermediate
    )
    expect(engine, model, rf"{MOE}, expert 0, gate and up projection")


def test_a_layer_that_multiplies_by_other_experts(
    engine: VllmEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply: Any = CPUUnquantizedExperts.apply

    def shifted(self: Any, *, topk_ids: Tensor, **rest: Any) -> None:
        apply(self, topk_ids=torch.where(topk_ids == 3, 0, topk_ids), **rest)

    monkeypatch.setattr(CPUUnquantizedExperts, "apply", shifted)
    expect(engine, model, rf"{MOE}, expert 3 ")


def test_weights_that_are_no_numbers(engine: VllmEngine) -> None:
    model = tiny.make_model("qwen3_moe", 41)
    model.model.layers[1].mlp.experts.gate_up_proj.data[2, 100, 3] = float("nan")
    expect(engine, model, rf"{MOE}, expert 2, gate and up projection .* NaN or infinite weights were written")


def test_one_row_of_an_expert_that_was_not_written(engine: VllmEngine, model: Any) -> None:
    weights, name = EngineWeights(engine), f"{MOE}.1.up_proj.weight"
    found = tiny.tensors(model)
    for piece in weights.pieces():
        part = piece.crop((0, 0), (79, 128)) if piece.name == name else piece
        weights.view(part).copy_(tiny.cut(found, part))
        weights.written([part])
    with pytest.raises(RuntimeError, match=rf"128 of 10240 elements of {name} were not written"):
        weights.finish()
    weights.discard()
    tiny.write(weights, model)
    assert engine.loaded.complete
