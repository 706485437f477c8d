"""Decoding: the cache against the full forward pass, batches against rows, and what compiles."""

import dataclasses
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_model import greedy, ids, load, model, outputs, pictures

from qwenvl_jax.inference import forward, generate
from qwenvl_jax.inference.errors import InputError
from qwenvl_jax.inference.sampling import Sampling, stack
from qwenvl_jax.inference.vl import VL
from qwenvl_jax.model.decoder import ntk_alpha
from qwenvl_jax.model.qwenvl import abstract_state

STEPS = 6


def step_by_step(cases: list[str], long_context: str = "row"):
    """Returns the logits [rows, STEPS, V] that each token was chosen from, and the tokens."""
    vl, rows = model(), len(cases)
    images = [pictures(case) for case in cases]
    prompts = vl._batch([ids(case) for case in cases], images, [STEPS] * rows, long_context)
    request = generate.Request(
        sampling=stack([Sampling()] * rows),
        max_new_B=np.full(rows, STEPS, np.int32),
        stop_BX=np.full((rows, generate.SMALLEST_STOP_LIST), generate.NO_TOKEN, np.int32),
    )
    generator = vl._generator
    prompts, request = generate.place((prompts, request), vl.mesh)
    decoding = generator._start(generator._state, prompts, request, answer_slots=32)
    logits = [np.asarray(decoding.logits_BV)]
    for until in range(2, STEPS + 1):
        decoding = generator._decode(
            generator._state, request, decoding=decoding, until=np.int32(until)
        )
        logits.append(np.asarray(decoding.logits_BV))
    return np.stack(logits, axis=1), np.asarray(decoding.answer_BT)[:, :STEPS]


def test_cached_decoding_equals_the_full_forward_pass():
    cases = ["text_short", "two_images", "text_long", "image_long"]
    logits, tokens = step_by_step(cases)
    for case, row_logits, row_tokens in zip(cases, logits, tokens, strict=True):
        assert row_tokens.tolist() == greedy(case)[:STEPS]
        golden = outputs()[f"{case}.greedy_logits"][:STEPS]
        np.testing.assert_allclose(row_logits, golden, atol=1e-4)
    # Within the trained length the rotary base does not depend on the prompt, so one forward pass
    # over prompt and answer must give the same scores at every step.
    short = ids("text_short")
    whole = model().logits(short + greedy("text_short")[:STEPS])
    np.testing.assert_allclose(logits[0], whole[len(short) - 1 : -1], atol=1e-4)


def test_long_logits_are_made_in_pieces_that_join(monkeypatch):
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 80)  # 150 positions: 80 and 70
    ours = model().logits(ids("text_long"))
    np.testing.assert_allclose(ours, outputs()["text_long.logits"], atol=1e-3)


def test_reference_mode_equals_left_padding():
    """The released batch: padded on the left, base and log-n from the padded length."""
    vl = model()
    short, long = ids("text_short"), ids("text_long")
    logits, _ = step_by_step(["text_short", "text_long"], "reference")

    padding = len(long) - len(short)
    segment_BL = np.array([[0] * padding + [1] * len(short)], np.int32)
    merged = nnx.merge(abstract_state(vl.config, vl.mesh)[0], vl._generator._state)
    hidden_BLD, _ = merged(
        jnp.array([[0] * padding + short], jnp.int32),
        position_BL=jnp.arange(len(long))[None],
        segment_BL=jnp.array(segment_BL),
        ntk_alpha_B=ntk_alpha(jnp.array([len(long)]), vl.config.decoder.seq_length),
    )
    np.testing.assert_allclose(logits[0, 0], merged.logits(hidden_BLD)[0, -1], atol=1e-4)
    np.testing.assert_allclose(logits[1, 0], outputs()["text_long.logits"][-1], atol=1e-4)
    alone = vl.logits(short)[-1]
    assert np.abs(logits[0, 0] - alone).max() > 1e-2  # the batch mate is felt, as released


@pytest.mark.parametrize("switch", ["use_logn", "use_dynamic_ntk"])
def test_what_changes_long_texts_can_be_switched_off(switch):
    vl = model()
    decoder = dataclasses.replace(vl.config.decoder, **{switch: False})
    config = dataclasses.replace(vl.config, decoder=decoder)
    graphdef, _ = abstract_state(config, vl.mesh)
    without = VL(config, graphdef, vl._generator._state, vl.mesh)
    short, long = ids("text_short"), ids("text_long")
    np.testing.assert_array_equal(without.logits(short), vl.logits(short))
    beyond = vl.config.decoder.seq_length
    assert len(long) > beyond
    assert np.abs(without.logits(long) - vl.logits(long))[beyond:].max() > 1e-2


def test_filler_tokens_leave_no_trace(monkeypatch):
    monkeypatch.setattr(generate, "_feed_width", lambda rows, config, mesh: 3)
    assert load().generate(ids("text_short"), max_new_tokens=24) == greedy("text_short")


def test_feed_width_fills_up_four_rows_for_bf16_on_a_cpu():
    vl = load(dtype="bfloat16")
    width = [generate._feed_width(rows, vl.config, vl.mesh) for rows in (1, 2, 4, 8)]
    assert width == [4, 2, 1, 1]
    assert generate._feed_width(1, model().config, vl.mesh) == 1
    answer = vl.generate(ids("text_short"), max_new_tokens=24)
    assert answer[:3] == greedy("text_short")[:3]  # bf16 rounds its way elsewhere later


def compilations(call) -> int:
    count = 0

    def listen(event: str, seconds: float, **_) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


def test_nothing_compiles_twice_inside_a_bucket():
    vl = model()
    prompt, image = ids("one_image"), pictures("one_image")
    longer = prompt + ids("text_short")[:20]

    def other_requests():
        vl.generate(longer, image, max_new_tokens=9, stop_tokens=[3, 5], repetition_penalty=1.2)
        vl.generate(longer[:40], 255 - image, temperature=1.5, top_p=0.5, max_new_tokens=30)
        list(vl.stream(prompt, image, max_new_tokens=12, every=5, top_k=4, seed=3))
        vl.logits(longer, image)

    vl.generate(prompt, 254 - image, max_new_tokens=5)
    vl.logits(prompt, image)
    assert compilations(other_requests) == 0
    assert compilations(lambda: jax.jit(lambda x: x + 1)(np.float32(2))) > 0  # the count counts


def test_stop_tokens_end_a_row_and_are_left_out():
    expected = greedy("text_short")
    stop = expected[7]
    first = expected.index(stop)
    assert (
        model().generate(ids("text_short"), max_new_tokens=24, stop_tokens=[stop])
        == (expected[:first])
    )
    batch = model().generate_batch(
        [ids("text_short"), ids("text_long")], max_new_tokens=24, stop_tokens=[stop]
    )
    other = greedy("text_long")
    assert batch == [expected[:first], other[: other.index(stop)] if stop in other else other]
    assert model().generate(ids("text_short"), max_new_tokens=5, stop_tokens=[expected[0]]) == []


def test_streamed_pieces_join_to_the_answer():
    pieces = list(model().stream(ids("text_short"), max_new_tokens=23, every=5))
    assert [len(piece) for piece in pieces] == [5, 5, 5, 5, 3]
    assert list(chain(*pieces)) == greedy("text_short")[:23]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_answers(count):
    assert model().generate(ids("text_short"), max_new_tokens=count) == greedy("text_short")[:count]
    pieces = model().stream(ids("text_short"), max_new_tokens=count)
    assert list(chain(*pieces)) == greedy("text_short")[:count]


def test_a_seed_decides_a_sampled_row_whatever_its_company():
    how = {"max_new_tokens": 16, "temperature": 3.0, "top_p": 0.95}
    prompt = ids("text_short")
    first = model().generate(prompt, seed=11, **how)
    assert model().generate(prompt, seed=11, **how) == first
    assert model().generate(prompt, seed=12, **how) != first
    rows = model().generate_batch([ids("text_long"), prompt], seed=10, **how)
    assert rows[1] == first


def test_repetition_penalty_reaches_prompt_and_answer():
    answer = model().generate(ids("one_image"), pictures("one_image"), max_new_tokens=24,
                              repetition_penalty=1e4)  # fmt: skip
    assert len(set(answer)) == 24
    assert not set(answer) & set(ids("one_image"))
    assert len(set(greedy("one_image"))) < 24


def test_wrong_requests_name_the_row():
    vl = model()
    with pytest.raises(InputError, match="row 1: 0 picture spans"):
        vl.generate_batch([[5], [6]], [None, pictures("one_image")])
    with pytest.raises(InputError, match=r"one entry of images for each row .* got 1 for 2"):
        vl.generate_batch([[5], [6]], [None])
    with pytest.raises(InputError, match=r"tokens: .* got 8,000 prompt tokens \+ 512 new"):
        vl.generate([5] * 8000)
    small = np.zeros((1, 28, 28, 3), np.uint8)
    with pytest.raises(InputError, match=r"same side: got \[28, 224\]"):
        vl.generate_batch([ids("one_image")] * 2, [small, pictures("one_image")])
    with pytest.raises(InputError, match=r"got seed 9223372036854775807 and 2 rows"):
        vl.generate_batch([[5], [6]], seed=2**63 - 1)
    with pytest.raises(InputError, match=r"seed must lie in .* got 9223372036854775808"):
        vl.generate_batch([[5], [6]], seed=2**63)
    with pytest.raises(InputError, match=r"stop_tokens .* got 2147483648"):
        vl.generate([5], stop_tokens=[2**31])
    with pytest.raises(TypeError, match="temprature"):
        vl.generate([5], temprature=1.0)
