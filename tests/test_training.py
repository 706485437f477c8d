"""The step: loss, plan, schedule, accumulation, meshes, and updates that must not happen."""

import dataclasses
import math
import re
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import ConfigError, MeshConfig, OptimizerConfig, ParameterRule
from qwenvl_jax.data.example import TASKS
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.presets import qwen_vl, released_finetune, stage_1, stage_2, stage_3, text_only
from qwenvl_jax.sharding import BATCH_AXES, batch_sharding, make_mesh, named_variables
from qwenvl_jax.training import optimizer
from qwenvl_jax.training.guard import REASONS
from qwenvl_jax.training.loop import train
from qwenvl_jax.training.loss import by_task, next_token_loss, sum_up
from qwenvl_jax.training.optimizer import describe_plan, learning_rate, plan_parameters
from qwenvl_jax.training.state import (
    TrainState,
    check_frozen_dtype,
    from_items,
    make_layout,
    random_weights,
    start_state,
    to_items,
    with_scalars,
)
from qwenvl_jax.training.step import make_train_step

# --- loss ---------------------------------------------------------------------------------------


def loss_inputs(rows=3, length=11, width=7, vocab=13):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (rows, length, width))
    head = jax.random.normal(keys[1], (width, vocab))
    targets = jax.random.randint(keys[2], (rows, length), 0, vocab)
    weight = jax.random.bernoulli(keys[3], 0.6, (rows, length)).astype(jnp.float32)
    return hidden, head, targets, weight


def reference_losses(hidden, head, targets, weight):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ head, targets) * weight


@pytest.mark.parametrize("chunk", [1, 5, 9, 33, 1000])
def test_chunked_loss_and_its_gradients(chunk):
    hidden, head, targets, weight = loss_inputs()
    total, losses = next_token_loss(hidden, head, targets, weight, chunk)
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-6)
    np.testing.assert_allclose(losses, reference_losses(hidden, head, targets, weight), rtol=1e-5)

    chunked = jax.grad(lambda h, w: next_token_loss(h, w, targets, weight, chunk)[0], (0, 1))
    whole = jax.grad(lambda h, w: reference_losses(h, w, targets, weight).sum(), (0, 1))
    for got, expected in zip(chunked(hidden, head), whole(hidden, head), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def sum_and_parts(losses):
    return losses.sum(), losses


def test_tokens_that_are_not_scored_cost_nothing():
    """Chunks end with the scored tokens: what stands behind them is not even looked at."""
    hidden, head, targets, _ = loss_inputs(rows=2, length=16)
    weight = jnp.zeros((2, 16)).at[0, 3:9].set(1.0).at[1, 11:13].set(1.0)
    unknown = jnp.where(weight[..., None] > 0, hidden, jnp.nan)

    def losses_and_gradients(loss, hidden):
        gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, losses), gradients = gradient(hidden, head)
        return losses, *gradients

    chunked = lambda h, w: next_token_loss(h, w, targets, weight, 4)  # noqa: E731
    whole = lambda h, w: sum_and_parts(reference_losses(h, w, targets, weight))  # noqa: E731
    expected = losses_and_gradients(whole, hidden)
    for got, known in zip(losses_and_gradients(chunked, unknown), expected, strict=True):
        np.testing.assert_allclose(got, known, atol=1e-5)
    _, nothing = next_token_loss(unknown, head, targets, jnp.zeros((2, 16)), 4)
    np.testing.assert_array_equal(nothing, 0.0)


def test_loss_of_split_rows_moves_no_token_to_another_device():
    hidden, head, targets, weight = loss_inputs(rows=8, length=16)
    loss = lambda h, w: next_token_loss(h, w, targets, weight, 8)[0]  # noqa: E731
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=1), jax.devices())
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        whole = NamedSharding(mesh, PartitionSpec())
        split = jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(rows, whole))
        compiled = split.lower(hidden, head).compile()
        value, gradients = compiled(jax.device_put(hidden, rows), jax.device_put(head, whole))
    expected, whole_gradients = jax.value_and_grad(loss, (0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, known in zip(gradients, whole_gradients, strict=True):
        np.testing.assert_allclose(got, known, atol=1e-5)
    exchanges = re.findall(
        r"(all-reduce|all-gather|all-to-all|collective-permute)\(", compiled.as_text()
    )
    assert set(exchanges) == {"all-reduce"}


def test_loss_never_holds_all_logits():
    hidden, head, targets, weight = loss_inputs(rows=2, length=512, width=8, vocab=4096)

    def peak(chunk: int) -> int:
        grad = jax.grad(lambda h, w: next_token_loss(h, w, targets, weight, chunk)[0], (0, 1))
        compiled = jax.jit(grad).lower(hidden, head).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 2 * 512 * 4096 * 4
    assert peak(64) < all_logits / 4 < all_logits <= peak(1024)


def test_loss_is_float32_from_bfloat16_states():
    hidden, head, targets, weight = loss_inputs()
    _, losses = next_token_loss(hidden.astype(jnp.bfloat16), head, targets, weight, 8)
    assert losses.dtype == jnp.float32
    expected = reference_losses(hidden, head, targets, weight)
    np.testing.assert_allclose(losses, expected, rtol=2e-2, atol=2e-2)


def test_sums_by_task_are_of_the_task_and_join_to_the_whole():
    random = np.random.default_rng(0)
    batch = tiny.batch(tiny.train_config(), 0)
    losses = random.random(batch.tokens.shape, np.float32) * batch.loss_weight
    sums = sum_up(jnp.asarray(losses), batch)
    for number in range(len(TASKS)):
        chosen = batch.task == number
        assert sums.task_loss[number] == pytest.approx(losses[chosen].sum(), rel=1e-5)
        assert sums.task_weight[number] == batch.loss_weight[chosen].sum()
    assert (sums.task_weight > 0).sum() == 2
    columns = by_task(np.asarray(sums.task_loss), np.asarray(sums.task_weight))
    names = [TASKS[1], TASKS[2]]
    assert set(columns) == {f"{what}/{x}" for x in names for what in ("loss", "scored_tokens")}
    joined = sum(columns[f"loss/{x}"] * columns[f"scored_tokens/{x}"] for x in names)
    assert joined == pytest.approx(float(sums.loss), rel=1e-5)
    without = sum_up(jnp.asarray(losses), batch._replace(task=None))
    assert float(without.loss) == float(sums.loss)
    assert not np.asarray(without.task_weight).any()


# --- plan and schedule --------------------------------------------------------------------------


def layout_of(config):
    sizes = config.mesh
    devices = jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor]
    return make_layout(config, make_mesh(sizes, devices))


def test_the_sum_of_a_head_gradient_over_chunks_loses_little_in_bfloat16():
    """It is added up in the compute dtype: 0.4 % off after eight chunks where one is 0.2 % off."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, 1024, 64)).astype(jnp.bfloat16)
    head = (jax.random.normal(keys[1], (64, 503)) / 4).astype(jnp.bfloat16)
    targets = jax.random.categorical(keys[2], -jnp.log(jnp.arange(1, 504.0)), shape=(1, 1024))
    weight = jnp.ones((1, 1024))

    def gradient(hidden, head, chunk):
        found = jax.grad(lambda head: next_token_loss(hidden, head, targets, weight, chunk)[0])
        return np.asarray(found(head), np.float64)

    exact = gradient(hidden.astype(jnp.float32), head.astype(jnp.float32), 1024)

    def error(chunk):
        off = gradient(hidden, head, chunk) - exact
        return np.linalg.norm(off) / np.linalg.norm(exact)

    assert error(1024) < 0.002
    assert error(128) < 0.0045


def test_weight_decay_follows_the_released_dimensions():
    layout = layout_of(tiny.train_config())
    decayed = {path for path, row in layout.plan.items() if row.weight_decay}
    assert {
        "vit.patch_embed.kernel",
        "vit.position_embed",
        "vit.blocks.attn.q_proj.kernel",
        "adapter.query",
        "adapter.proj.kernel",
        "decoder.embed.embedding",
        "decoder.blocks.mlp.gate_proj.kernel",
        "decoder.lm_head.kernel",
    } <= decayed
    # Two or three dimensions here, one in the released layout.
    assert not decayed & {
        "vit.blocks.attn.q_proj.bias",
        "vit.blocks.ln_1.scale",
        "adapter.attn.k_proj.bias",
        "decoder.blocks.attn.v_proj.bias",
        "decoder.blocks.ln_1.scale",
        "decoder.ln_f.scale",
    }


def test_layer_decay_of_the_tower_only():
    plan = layout_of(tiny.train_config()).plan
    assert plan["vit.blocks.mlp.up_proj.bias"].rate == pytest.approx((0.9**3, 0.9**2, 0.9))
    for path in ("vit.patch_embed.kernel", "vit.position_embed", "vit.ln_pre.scale"):
        assert plan[path].rate == pytest.approx((0.9**4,))
    for path in ("adapter.query", "adapter.ln_post.bias", "decoder.blocks.ln_1.scale"):
        assert plan[path].rate == (1.0,)


def test_layer_decay_slows_what_stands_before_the_blocks_not_what_follows():
    plan = layout_of(
        tiny.train_config(parameters=(ParameterRule("*", rate=2.0, layer_decay=0.5),))
    ).plan
    for path in ("decoder.ln_f.scale", "decoder.lm_head.kernel", "adapter.proj.kernel"):
        assert plan[path].rate == (2.0,), path
    num_layers = len(plan["decoder.blocks.ln_1.scale"].rate)
    assert plan["decoder.embed.embedding"].rate == (2.0 * 0.5 ** (num_layers + 1),)


def test_the_first_row_that_matches_decides():
    table = (
        ParameterRule("decoder.blocks.*.q_proj.*", rate=0.5, weight_decay=0.25),
        ParameterRule("decoder.*", is_trained=False),
        ParameterRule("*", rate=2.0),
    )
    plan = layout_of(tiny.train_config(parameters=table)).plan
    q_proj = plan["decoder.blocks.attn.q_proj.kernel"]
    assert (q_proj.is_trained, q_proj.rate, q_proj.weight_decay) == (True, (0.5,), 0.25)
    assert not plan["decoder.blocks.attn.k_proj.kernel"].is_trained
    assert plan["vit.ln_pre.bias"].rate == (2.0,)
    assert not plan["adapter.position_embed"].is_trained, "a fixed table, whatever the rows say"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("decoder.block.*", {}), ("*", {})], r"'decoder\.block\.\*' matches no parameter"),
        ([("adapter.position_embed", {}), ("*", {})], "matches no parameter"),
        ([("vit.*", {}), ("*.bias", {}), ("vit.*.bias", {}), ("*", {})], r"'vit\.\*\.bias' has no"),
        (
            [("vit.*", {}), ("*", {}), ("adapter.*", {})],
            r"'adapter\.\*' has no effect.*'\*' before",
        ),
        ([("vit.*", {}), ("decoder.*", {})], r"no row matches \d+ parameters \(adapter\."),
        ([("adapter.*", {"layer_decay": 0.9}), ("*", {})], "matches no stacked layers"),
    ],
)
def test_tables_that_do_not_fit_are_refused(rows, words):
    table = tuple(ParameterRule(pattern, **values) for pattern, values in rows)
    with pytest.raises(ConfigError, match=words):
        layout_of(tiny.train_config(parameters=table))


PAPER = {  # Table 8: side, tokens, steps, warm-up, rows, peak and last rate, tower's decay; frozen
    "stage1_pretrain": (224, 512, 50_000, 500, 30_720, 2e-4, 1e-6, 0.95, {"decoder"}),
    "stage2_multitask": (448, 2048, 19_000, 400, 4096, 5e-5, 1e-5, 0.95, set()),
    "stage3_chat": (448, 2048, 8000, 3000, 128, 1e-5, 1e-6, None, {"vit"}),
}


@pytest.mark.parametrize("name", PAPER)
def test_stages_have_the_papers_figures(name):
    config = load_config(Path("configs") / f"{name}.py")
    data, optimizer = config.data, config.optimizer
    model = qwen_vl()
    assert (config.model.vision, config.model.adapter) == (model.vision, model.adapter)
    assert (config.model.decoder, config.model.adapter.num_queries) == (model.decoder, 256)
    _, state = abstract_state(config.model)
    plan = plan_parameters(state, config.parameters)
    parts = {part: [row for path, row in plan.items() if path.startswith(part)]
             for part in ("vit", "adapter", "decoder")}  # fmt: skip
    frozen = {part for part, rows in parts.items() if not any(row.is_trained for row in rows)}
    decays = {row.weight_decay for row in plan.values() if row.is_trained}
    assert decays == {0.0, 0.05}
    tower = {rule.layer_decay for rule in config.parameters if rule.pattern.startswith("vit")}
    assert (
        data.image_size,
        data.length,
        config.steps,
        optimizer.warmup_steps,
        data.rows,
        optimizer.peak_lr,
        optimizer.end_lr,
        None if frozen == {"vit"} else max(tower, key=lambda decay: decay != 1),
        frozen,
    ) == PAPER[name]
    same = (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.clip_norm)
    assert same == (0.9, 0.98, 1e-6, 1.0)
    assert config.model.dtype == "bfloat16"


def test_rates_of_a_frozen_row_are_refused():
    with pytest.raises(ConfigError, match=r"'vit\.\*' is not trained.*weight_decay=0\.1"):
        ParameterRule("vit.*", is_trained=False, weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"weight_decay of '\*' must lie in 0\.\.1: got nan"):
        ParameterRule("*", weight_decay=math.nan)
    with pytest.raises(ConfigError, match="no trained row"):
        tiny.train_config(parameters=(ParameterRule("*", is_trained=False),))


@pytest.mark.parametrize(
    "table", [stage_1(), stage_2(), stage_3(), text_only(), released_finetune()]
)
def test_named_tables_fit_the_released_model(table):
    _, state = abstract_state(qwen_vl())
    plan = optimizer.plan_parameters(state, table)
    assert plan.keys() == named_variables(state).keys()
    if table == released_finetune():
        trained = {path for path, row in plan.items() if row.is_trained}
        assert {"adapter.query", "adapter.kv_proj.kernel", "adapter.attn.o_proj.bias"} <= trained
        assert not trained & {"adapter.proj.kernel", "adapter.ln_post.scale", "vit.position_embed"}
    if table == stage_1():
        rates = plan["vit.blocks.ln_1.scale"].rate
        assert (rates[0], rates[47]) == pytest.approx((0.95**48, 0.95))


@pytest.mark.parametrize(
    ("table", "trained_parts"),
    [(stage_1(), {"vit", "adapter"}), (stage_3(), {"adapter", "decoder"})],
)
def test_frozen_parts_have_no_optimizer_memory(table, trained_parts):
    layout = layout_of(tiny.train_config(parameters=table))
    assert {path.split(".")[0] for path in layout.abstract.trainable} == trained_parts
    assert "adapter.position_embed" in layout.abstract.frozen
    moments = sum(leaf.size for leaf in jax.tree.leaves(layout.abstract.optimizer))
    trained = sum(leaf.size for leaf in layout.abstract.trainable.values())
    assert moments == 2 * trained + 1  # and the count of updates


def test_frozen_parts_take_no_memory_for_gradients_or_moments():
    def compiled_bytes(table) -> tuple[int, int, int]:
        """Returns (arguments, temporaries) of the compiled step, and the size of what is frozen."""
        config = tiny.train_config(model=wide, parameters=table, micro_batches=2)
        layout = layout_of(config)
        lowered = make_train_step(config, layout).lower(layout.abstract, tiny.batch(config, 0))
        # The level is the machine code's; what is stored is decided before it.
        compiled = lowered.compile({"xla_backend_optimization_level": 0})
        memory = compiled.memory_analysis()
        frozen = sum(x.size * 4 for x in layout.abstract.frozen.values())
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes, frozen

    # Wide enough for weights to outweigh activations; two micro-batches hold a sum of gradients.
    decoder = dataclasses.replace(tiny.model_config().decoder, mlp_dim=20_000)
    wide = tiny.model_config(decoder=decoder)
    arguments, temporaries, fixed = compiled_bytes(stage_2())
    frozen_arguments, frozen_temporaries, frozen = compiled_bytes(stage_1())
    assert arguments - frozen_arguments == 2 * (frozen - fixed), "both moments are gone"
    assert temporaries - frozen_temporaries > 0.9 * (frozen - fixed), "so is the gradient"


def test_a_dtype_for_what_does_not_train_is_refused_where_all_trains():
    for table, told in ((stage_3(), None), (stage_2(tower_decay=0.9), "has no effect: got 'bf")):
        config = tiny.train_config(parameters=table, frozen_dtype="bfloat16")
        layout = make_layout(config, make_mesh(config.mesh, jax.devices()[:1]))
        with pytest.raises(ConfigError, match=told) if told else nullcontext():
            check_frozen_dtype(config, layout)
    with pytest.raises(ConfigError, match=r"TrainConfig\.frozen_dtype has no effect"):
        train(config, devices=jax.devices()[:1])


def test_table_of_what_trains():
    config = tiny.train_config(parameters=stage_1(weight_decay=0.125))
    layout = layout_of(config)
    table = describe_plan(layout.model_state, layout.plan)
    sizes = {path: v.get_value().size for path, v in named_variables(layout.model_state).items()}
    trained = sum(size for path, size in sizes.items() if layout.plan[path].is_trained)
    assert f"{trained:,}" in table.splitlines()[-1]
    assert f"{sum(sizes.values()) - trained:,}" in table.splitlines()[-1]
    assert max(map(len, table.splitlines())) < 80  # the width of a narrow terminal
    by_part = {line.split()[0]: line for line in table.splitlines()}
    assert by_part["decoder"].endswith("frozen")
    assert by_part["vit.blocks"].endswith("0.8574 .. 0.95  0.125")  # 0.95**3 for the first


def test_schedule():
    config = OptimizerConfig(peak_lr=1.0, end_lr=0.2, warmup_steps=4)
    rates = [float(learning_rate(jnp.int32(step), config, 12)) for step in range(14)]
    assert rates[:5] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert rates[8] == pytest.approx(0.6)  # half way down the cosine
    assert rates[12] == pytest.approx(0.2)
    assert rates[13] == pytest.approx(0.2)
    assert (
        float(
            learning_rate(jnp.int32(0), OptimizerConfig(peak_lr=1.0, end_lr=1.0, warmup_steps=0), 5)
        )
        == 1.0
    )


# --- step ---------------------------------------------------------------------------------------


def run(config, step=None, steps=4):
    """Returns (metrics of every step, final state) of a few steps on the test batches."""
    layout = layout_of(config)
    weights = random_weights(config, layout)
    state = start_state(config, layout, weights)
    step = step or make_train_step(config, layout)
    place = batch_sharding(layout.mesh)
    history = []
    for i in range(steps):
        state, metrics = step(state, jax.device_put(tiny.batch(config, i), place))
        history.append(jax.device_get(metrics))
    assert step._cache_size() == 1, "one compilation a run"
    return history, state


@pytest.fixture(scope="module")
def plain_step():
    """Returns the step of the unchanged test config: compiling it is what takes the time."""
    config = tiny.train_config()
    return make_train_step(config, layout_of(config))


@pytest.fixture(scope="module")
def one_device(plain_step):
    return run(tiny.train_config(), plain_step)


def assert_same_run(found, expected, rtol):
    names = ("loss", "grad_norm", "lr", "scored_tokens", "tokens", "images")
    for name in (*names, "task_loss", "task_weight"):
        np.testing.assert_allclose(
            [m[name] for m in found], [m[name] for m in expected], rtol=rtol, err_msg=name
        )


def test_loss_starts_near_that_of_guessing(one_device):
    history, state = one_device
    vocabulary = tiny.model_config().decoder.vocab_size
    assert history[0]["loss"] == pytest.approx(math.log(vocabulary), rel=0.2)
    assert history[0]["images"] == 8
    assert history[0]["tokens"] == 8 * 18  # the last column of the test batch is padding
    for metrics in history:
        assert metrics["task_weight"].sum() == metrics["scored_tokens"]
        mean = metrics["task_loss"].sum() / metrics["scored_tokens"]
        assert mean == pytest.approx(metrics["loss"], rel=1e-6)
    assert int(state.step) == 4


def test_micro_batches_change_nothing(one_device):
    found, _ = run(tiny.train_config(micro_batches=8))
    assert_same_run(found, one_device[0], rtol=2e-5)


@pytest.mark.parametrize(
    ("shape", "micro_batches"),
    [((8, 1, 1), 1), ((1, 1, 4), 1), ((2, 2, 2), 2)],
)
def test_meshes_change_nothing(one_device, shape, micro_batches):
    data, fsdp, tensor = shape
    mesh = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    config = tiny.train_config(mesh=mesh, micro_batches=micro_batches)
    found, state = run(config)
    assert_same_run(found, one_device[0], rtol=2e-5)
    expected = layout_of(config).shardings
    for path, array in state.trainable.items():
        assert array.sharding.is_equivalent_to(expected.trainable[path], array.ndim), path
    if fsdp > 1:
        moment = state.optimizer[0].mu["decoder.embed.embedding"]
        assert moment.addressable_shards[0].data.size * fsdp * tensor == moment.size


def test_rows_that_do_not_divide_are_refused():
    config = tiny.train_config(micro_batches=4, mesh=MeshConfig(data=4, fsdp=1, tensor=2))
    with pytest.raises(ConfigError, match=r"rows=8, micro_batches=4 .* 4 devices"):
        make_train_step(config, layout_of(config))


def test_frozen_part_keeps_its_weights_and_passes_gradients():
    config = tiny.train_config(parameters=stage_1())
    layout = layout_of(config)
    before = jax.device_get(random_weights(config, layout))
    history, state = run(config)
    for path, array in state.frozen.items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    assert all(m["grad_norm"] > 1e-3 for m in history)
    moved = [p for p, x in state.trainable.items() if not np.array_equal(x, before[p])]
    assert set(moved) == set(state.trainable)


def poisoned(batch, kind):
    if kind == "nothing scored":
        return batch._replace(loss_weight=0 * batch.loss_weight)
    return batch._replace(loss_weight=batch.loss_weight * np.float32(kind))


@pytest.mark.parametrize("kind", ["nan", "inf", "nothing scored"])
def test_a_step_that_is_not_finite_changes_nothing(kind, plain_step):
    config, step = tiny.train_config(), plain_step
    layout = layout_of(config)
    state = start_state(config, layout, random_weights(config, layout))
    place = batch_sharding(layout.mesh)

    def batch_of(i):
        return jax.device_put(tiny.batch(config, i), place)

    for i in range(2):
        state, _ = step(state, batch_of(i))
    before = jax.device_get(state)
    state, metrics = step(state, poisoned(batch_of(2), kind))
    after = jax.device_get(state)
    for name in ("trainable", "frozen", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert (after.step, after.guard.skipped, after.guard.hold) == (3, 1, kind != "nothing scored")
    assert metrics["skipped"] == 1
    held, metrics = step(with_scalars(state, 3), batch_of(3))
    if kind != "nothing scored":
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(held), after)
        assert REASONS[int(metrics["verdict"])] == "on hold"
        held, metrics = step(with_scalars(held, 3, hold=0), batch_of(3))
    state = held
    assert (metrics["skipped"], metrics["refused_in_a_row"]) == (1, 0)
    assert not np.array_equal(
        state.trainable["decoder.ln_f.scale"], before.trainable["decoder.ln_f.scale"]
    )
    # The schedule follows the steps, not the updates.
    assert metrics["lr"] == pytest.approx(
        float(learning_rate(jnp.int32(3), config.optimizer, config.steps))
    )


def test_state_survives_its_flat_form(one_device):
    config = tiny.train_config()
    _, state = one_device
    items = to_items(state)
    assert set(items["weights"]) == set(layout_of(config).plan)
    again = from_items(items, layout_of(config).abstract)
    assert isinstance(again, TrainState)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_text_only_rows():
    config = tiny.train_config(parameters=text_only())
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_images=0))
    layout = layout_of(config)
    state = start_state(config, layout, random_weights(config, layout))
    batch = tiny.batch(tiny.train_config(), 0)
    batch = batch._replace(images=batch.images[:, :0], image_start=batch.image_start[:, :0])
    _, metrics = make_train_step(config, layout)(state, batch)
    assert metrics["images"] == 0
    assert np.isfinite(metrics["loss"])
