"""Writing an engine's weights: every region once, every packed kernel proven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aligner.rollout.vllm.engine import VllmEngine
from aligner.rollout.vllm.weights import EngineWeights
from tests.rollout import tiny

Models = dict[str, tuple[Any, str]]
QWEN2 = pytest.mark.parametrize("engine", ["qwen2"], indirect=True)
TIED = pytest.mark.parametrize("engine", ["qwen3_tied"], indirect=True)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, models: Models, group: dist.ProcessGroup) -> Iterator[VllmEngine]:
    """Shared by the tests of one family: each test writes all weights anew."""
    made = VllmEngine(models[request.param][1], group, "test", tiny.CONFIG, torch.device("cpu"))
    yield made
    made.close()


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tiny.tensors(model).items()}


@QWEN2
def test_pieces_cover_the_checkpoint_in_the_engines_order(engine: VllmEngine, models: Models) -> None:
    model = models["qwen2"][0]
    weights = EngineWeights(engine)
    before = {name: id(value) for name, value in engine.model.named_parameters()}
    pieces = weights.pieces()
    assert {name: id(value) for name, value in engine.model.named_parameters()} == before
    assert {(piece.name, piece.size) for piece in pieces} == set(shapes(model).items())
    assert all(not any(piece.lo) and piece.dtype == "float32" for piece in pieces)
    by_name = {piece.name: piece for piece in pieces}
    # q (4 heads), k and v (2 each) stand on top of each other: rows 0, 128 and 192 of 256, by 128 columns.
    layer = "model.layers.1.self_attn"
    offsets = [by_name[f"{layer}.{part}_proj.weight"].offset for part in "qkv"]
    assert offsets == [0, 128 * 128, 192 * 128]
    assert [by_name[f"{layer}.{part}_proj.bias"].offset for part in "qkv"] == [0, 128, 192]
    assert by_name[f"{layer}.k_proj.weight"].storage == f"{layer}.qkv_proj:weight"
    storages = [piece.storage for piece in pieces]
    assert len(set(storages)) == sum(a != b for a, b in zip(storages, [None, *storages[:-1]], strict=True))


@TIED
def test_a_tensor_too_few_or_too_many_is_named(engine: VllmEngine, models: Models) -> None:
    whole = shapes(models["qwen3_tied"][0])
    for missing, where in (
        ("model.norm.weight", "model.norm:weight"),
        ("model.layers.0.self_attn.k_proj.weight", r"model\.layers\.0\.self_attn\.qkv_proj:weight"),
        ("model.embed_tokens.weight", "model.embed_tokens:weight"),
    ):
        with pytest.raises(ValueError, match=where):
            EngineWeights(engine, tensors={name: shape for name, shape in whole.items() if name != missing}).pieces()
    with pytest.raises(ValueError, match=r"no parameter for tensor lm_head\.weight.*tie_word_embeddings"):
        EngineWeights(engine, tensors={**whole, "lm_head.weight": (tiny.VOCAB, 128)}).pieces()
    with pytest.raises(ValueError, match="rotary"):
        EngineWeights(engine, tensors={**whole, "model.rotary.extra": (4,)}).pieces()
    tiny.write(EngineWeights(engine), models["qwen3_tied"][0])  # the failures have changed nothing
    assert engine.loaded.complete


@QWEN2
def test_a_pack_that_was_skipped_is_detected(
    engine: VllmEngine, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    weights = EngineWeights(engine)
    tiny.write(weights, models["qwen2"][0])
    changed = tiny.make_model("qwen2", 50)
    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", lambda self, layer: None)
    with pytest.raises(RuntimeError, match=r"packed kernel of model\.layers\.0\.self_attn\.qkv_proj"):
        tiny.write(weights, changed)
    assert not engine.loaded.complete
    monkeypatch.undo()
    weights.discard()
    tiny.write(weights, changed)
    assert engine.loaded.complete


@QWEN2
def test_regions_written_together_enter_the_engine_once(
    engine: VllmEngine, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each module is packed with its last region: no plain weights of a complete one stay."""
    weights, entries, packing = EngineWeights(engine), list[int](), engine.packing
    monkeypatch.setattr(engine, "packing", lambda: entries.append(1) or packing())
    tensors = tiny.tensors(models["qwen2"][0])
    pieces = weights.pieces()
    with weights.writing():
        for piece in pieces:
            weights.view(piece).copy_(tensors[piece.name])
            weights.written([piece])
            storages = {other.storage for other in pieces[: pieces.index(piece) + 1]}
            assert len(weights._sync.plain) <= 1 and weights._sync.plain.keys() <= storages
    weights.finish()
    assert entries == [1]
    tiny.write(weights, models["qwen2"][0])
    assert len(entries) > 2, "by itself each module does"


@TIED
def test_a_tied_output_layer_is_packed_again_and_proven(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    weights = EngineWeights(engine)
    monkeypatch.setattr(UnquantizedEmbeddingMethod, "process_weights_after_loading", lambda self, layer: None)
    with pytest.raises(RuntimeError, match=r"packed kernel of lm_head \(128 x 128\)"):
        tiny.write(weights, tiny.make_model("qwen3_tied", 60))


@QWEN2
def test_one_wrong_element_in_a_pack_is_detected(
    engine: VllmEngine, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    weights = EngineWeights(engine)
    pack = UnquantizedLinearMethod.process_weights_after_loading

    def garbled(self: UnquantizedLinearMethod, layer: Any) -> None:
        layer.weight.data = layer.weight.data.clone()
        layer.weight.data[3, 5] = torch.nextafter(layer.weight.data[3, 5], torch.tensor(9.0))
        pack(self, layer)

    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", garbled)
    with pytest.raises(RuntimeError, match="does not hold what was written"):
        tiny.write(weights, models["qwen2"][0])


@QWEN2
def test_weights_that_are_no_numbers_are_refused(engine: VllmEngine) -> None:
    model = tiny.make_model("qwen2", 7)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.mlp\.down_proj.*NaN"):
        tiny.write(EngineWeights(engine), model)


@QWEN2
def test_every_region_exactly_once(engine: VllmEngine, models: Models) -> None:
    model = models["qwen2"][0]
    weights = EngineWeights(engine)
    pieces = weights.pieces()
    with pytest.raises(RuntimeError, match=r"16384 of 16384 elements of model\.layers\.0\.self_attn\.o_proj\.weight"):
        tiny.write(weights, model, skip="model.layers.0.self_attn.o_proj.weight")
    assert not engine.loaded.complete
    query = next(piece for piece in pieces if piece.name.endswith("q_proj.weight"))
    half = query.crop((0, 0), (64, 128))
    weights.view(half).zero_()
    weights.written([half])
    with pytest.raises(RuntimeError, match=r"q_proj\.weight\[32:96, 0:128\] was written twice"):
        weights.written([query.crop((32, 0), (64, 128))])
    weights.discard()
    tiny.write(weights, model)
    assert engine.loaded.complete


@QWEN2
def test_written_regions_can_be_read_back_and_the_plain_copy_goes(engine: VllmEngine, models: Models) -> None:
    model = models["qwen2"][0]
    weights = EngineWeights(engine)
    found = tiny.tensors(model)
    linear: Any = dict(engine.model.named_modules())["model.layers.0.mlp.gate_up_proj"]
    assert linear.weight.numel() == 0
    for piece in weights.pieces():
        weights.view(piece).copy_(tiny.cut(found, piece))
        assert torch.equal(weights.view(piece), tiny.cut(found, piece))
        weights.written([piece])
    weights.finish()
    assert linear.weight.numel() == 0
    embedding: Any = dict(engine.model.named_modules())["model.embed_tokens"]
    assert torch.equal(embedding.weight[: tiny.VOCAB], found["model.embed_tokens.weight"])
    assert not embedding.weight[tiny.VOCAB :].any()  # rows that round the vocabulary up
    with pytest.raises(RuntimeError, match="look-ups only"):
        embedding.quant_method.apply(embedding, torch.ones(1, 128))
