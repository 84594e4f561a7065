"""The next calls as the step before went, worked by hand."""

from __future__ import annotations

from aligner.spmd.call_order import CallOrder, NeedingCall

CACHE, WEIGHTS, REFERENCE = ("rollout", "cache"), ("policy", "weights"), ("reference", "weights")
CALLS = {
    "generate": frozenset({CACHE}),
    "logprobs": frozenset({REFERENCE}),
    "update": frozenset({WEIGHTS}),
}


def after(*names: str) -> CallOrder:
    order = CallOrder()
    for name in names:
        order.record(NeedingCall(name, CALLS[name], frozenset({0})))
    return order


def test_nothing_follows_what_was_never_followed() -> None:
    assert list(after("generate", "logprobs", "update").following()) == []
    assert after("generate").calls_until({CACHE}) == {}


def test_the_step_before_is_expected_again_and_then_it_ends() -> None:
    order = after(*("generate", "logprobs", "update") * 2)
    assert [call.what for call in order.following()] == ["generate", "logprobs", "update"]
    assert order.calls_until({CACHE, REFERENCE}) == {CACHE: 1, REFERENCE: 2}
    assert order.calls_until({("critic", "weights")}) == {}, "it was never needed"


def test_two_calls_tell_which_generate_it_is() -> None:
    """A step generates twice: only the call before says whether logprobs comes next."""
    step = ("generate", "generate", "logprobs", "update")
    assert next(after(*step * 2, "generate").following()).what == "generate"
    assert next(after(*step * 2, "generate", "generate").following()).what == "logprobs"
