"""LoRA: pairs that change nothing at first, train alone, and are gone wherever a run is read."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from qwenvl_jax.checkpoint.weights import open_weights, save_weights
from qwenvl_jax.cli.convert import main
from qwenvl_jax.cli.train import read_config
from qwenvl_jax.config import (
    ConfigError,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    ParameterRule,
)
from qwenvl_jax.conversion.load import load_weights
from qwenvl_jax.conversion.load import read_config as read_model
from qwenvl_jax.conversion.run import export_released, import_released, import_run
from qwenvl_jax.model.layers import scan_layers, stack_layers
from qwenvl_jax.model.lora import LowRank, fold, is_lora, kernel_of
from qwenvl_jax.model.noise import dropout, noise
from qwenvl_jax.model.qwenvl import QwenVL, abstract_state, draw_state
from qwenvl_jax.presets import lora_only, qwen_vl, released_lora
from qwenvl_jax.sharding import batch_sharding, make_mesh, named_variables
from qwenvl_jax.training.flops import step_flops
from qwenvl_jax.training.loop import initial_weights, train
from qwenvl_jax.training.optimizer import describe_plan, plan_parameters
from qwenvl_jax.training.state import make_layout, random_weights, start_state
from qwenvl_jax.training.step import batch_loss, make_train_step

# Every kind of matrix: stacked and not, one and two dimensions on either side.
EVERYWHERE = LoraConfig(
    rank=3, alpha=6.0, targets=("vit.*", "adapter.*", "decoder.blocks.*"), dropout=0.3
)


def lora_config(run_dir="unused", lora=EVERYWHERE, **changes):
    model = tiny.model_config(lora=lora)
    return tiny.train_config(run_dir, model=model, parameters=lora_only(), **changes)


def exportable(**changes):
    """Returns a tiny model whose sizes the released format can express."""
    adapter = dataclasses.replace(tiny.model_config().adapter, num_heads=1)
    vision = dataclasses.replace(tiny.model_config().vision, table_side=16)
    decoder = dataclasses.replace(tiny.model_config().decoder, width=128, head_dim=32)
    return tiny.model_config(adapter=adapter, vision=vision, decoder=decoder, **changes)


def layout_of(config):
    sizes = config.mesh
    devices = jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor]
    return make_layout(config, make_mesh(sizes, devices))


def run(config, batches=tiny.batches):
    train(config, batches=lambda first: batches(config, first), devices=jax.devices()[:1])


def with_random_pairs(config, layout, std=0.1):
    """Returns weights whose pairs are no longer zero."""
    weights = random_weights(config, layout)
    random = np.random.default_rng(0)
    for path, array in weights.items():
        if path.endswith(".lora.up"):
            drawn = random.normal(0, std, array.shape).astype(np.float32)
            weights[path] = jax.device_put(drawn, array.sharding)
    return weights


def summed_loss(config, layout):
    """Returns a function from weights to the loss of one batch."""
    batch = jax.tree.map(jnp.asarray, tiny.batch(config, 0))
    return jax.jit(
        lambda weights: batch_loss(layout.graphdef, weights, batch, config.loss_chunk)[0]
    )


def test_every_matrix_but_the_head_can_have_a_pair():
    layout = layout_of(lora_config())
    paths = layout.abstract.trainable
    assert all(is_lora(path) for path in paths)
    kernels = {path for path in layout.abstract.frozen if path.endswith(".kernel")}
    assert {kernel_of(path) for path in paths} == kernels - {"decoder.lm_head.kernel"}


def test_fresh_pairs_change_nothing_and_folded_ones_compute_the_same():
    config, plain = lora_config(), tiny.train_config()
    layout = layout_of(config)
    loss, plain_loss = summed_loss(config, layout), summed_loss(plain, layout_of(plain))
    fresh = random_weights(config, layout)
    base = {path: array for path, array in fresh.items() if not is_lora(path)}
    expected = plain_loss(base)
    np.testing.assert_allclose(loss(fresh), expected, rtol=1e-6)

    weights = with_random_pairs(config, layout)
    changed = loss(weights)
    assert abs(changed - expected) > 1.0
    folded = fold(weights, config.model.lora)
    assert folded.keys() == base.keys()
    np.testing.assert_allclose(plain_loss(folded), changed, rtol=1e-5)


def test_a_pairs_gradient_is_the_kernels_seen_through_the_other_half():
    config = lora_config()
    layout = layout_of(config)
    weights = with_random_pairs(config, layout)
    gradient = jax.grad(summed_loss(config, layout))(weights)
    scale = config.model.lora.alpha / config.model.lora.rank
    for name in ("attn.q_proj", "attn.o_proj", "mlp.down_proj"):
        base = f"decoder.blocks.{name}"
        kernel = gradient[f"{base}.kernel"]
        num_layers, rank = kernel.shape[0], config.model.lora.rank
        down, up = weights[f"{base}.lora.down"], weights[f"{base}.lora.up"]
        inputs = down.size // num_layers // rank
        kernel = kernel.reshape(num_layers, inputs, -1)
        down = down.reshape(num_layers, inputs, rank)
        up = up.reshape(num_layers, rank, -1)
        found = gradient[f"{base}.lora.down"].reshape(down.shape)
        np.testing.assert_allclose(
            found, scale * kernel @ up.swapaxes(1, 2), rtol=1e-3, atol=1e-4, err_msg=base
        )
        found = gradient[f"{base}.lora.up"].reshape(up.shape)
        np.testing.assert_allclose(
            found, scale * down.swapaxes(1, 2) @ kernel, rtol=1e-3, atol=1e-4, err_msg=base
        )


def steps(config, count=3):
    layout = layout_of(config)
    state = start_state(config, layout, random_weights(config, layout))
    before = jax.device_get(state.frozen)
    step, place, losses = make_train_step(config, layout), batch_sharding(layout.mesh), []
    for i in range(count):
        state, metrics = step(state, jax.device_put(tiny.batch(config, i), place))
        losses.append(float(metrics["loss"]))
    return losses, before, state


def test_pairs_train_alone_and_alike_on_one_device_and_on_eight():
    losses, before, state = steps(lora_config(lora=released_lora()))
    for path, array in jax.device_get(state.frozen).items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)
    assert all(np.abs(x).max() > 0 for x in jax.device_get(state.trainable).values())
    assert losses[2] != losses[0]
    found, *_ = steps(lora_config(lora=released_lora(), mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    plain, *_ = steps(lora_config(lora=dataclasses.replace(released_lora(), dropout=0.0)))
    assert plain[0] == losses[0], "pairs that are zero lose nothing by dropout"
    assert plain[2] != losses[2]


def test_every_step_seed_and_micro_batch_drops_otherwise():
    """Keys come from seed and step alone, so a step that is made again repeats itself."""

    def losses(config, at, batch):
        layout, found = layout_of(config), []
        step = make_train_step(config, layout)
        for number in at:
            weights = {
                path: x + 0.1 if path.endswith("lora.up") else x  # else dropout changes nothing
                for path, x in random_weights(config, layout).items()
            }
            state = start_state(config, layout, weights)._replace(step=jnp.int32(number))
            _, metrics = step(state, jax.device_put(batch, batch_sharding(layout.mesh)))
            found.append(float(metrics["loss"]))
        return found

    # As many equal rows as micro-batches: with one key for all of them, their mean is that of one.
    row = jax.tree.map(lambda x: x[:1], tiny.batch(lora_config(), 0))
    batches, configs = {}, {}
    for count in (2, 4):
        data = dataclasses.replace(lora_config().data, rows=count)
        configs[count] = lora_config(data=data, micro_batches=count)
        batches[count] = jax.tree.map(lambda x, n=count: np.repeat(x, n, axis=0), row)
    first, second, again = losses(configs[2], (0, 1, 0), batches[2])
    assert first == again
    others = [second, *losses(configs[4], (0,), batches[4])]
    others += losses(dataclasses.replace(configs[2], seed=8), (0,), batches[2])
    assert all(abs(other / first - 1) > 1e-4 for other in others)


def test_frozen_weights_in_bfloat16_give_what_a_bfloat16_step_gives():
    model = tiny.model_config(lora=released_lora(), dtype="bfloat16")
    config = lora_config()
    config = dataclasses.replace(config, model=model)
    narrow = dataclasses.replace(config, frozen_dtype="bfloat16")
    layout = layout_of(narrow)
    kinds = {path: str(x.dtype) for path, x in layout.abstract.frozen.items()}
    assert kinds["decoder.blocks.mlp.up_proj.kernel"] == "bfloat16"
    assert kinds["adapter.position_embed"] == "float32", "a fixed table is no parameter"
    assert {str(x.dtype) for x in layout.abstract.trainable.values()} == {"float32"}
    # Kernels are rounded to bfloat16 before a product anyway; norms and biases lose a little.
    found, expected = (
        summed_loss(c, layout)(random_weights(c, layout))
        for c, layout in ((narrow, layout), (config, layout_of(config)))
    )
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_run_goes_on_bit_equal_and_is_read_with_its_pairs_folded(tmp_path):
    whole = lora_config(tmp_path / "whole", released_lora(), frozen_dtype="bfloat16")
    run(whole)
    # As a run that was killed after its save at step 4.
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "6")
    run(dataclasses.replace(whole, run_dir=str(tmp_path / "broken")))

    config = read_model(tmp_path / "whole")
    assert config == tiny.model_config(), "a reader sees a model without pairs"
    _, abstract = abstract_state(config, make_mesh())
    one, two = (
        {path: np.asarray(v.get_value()) for path, v in named_variables(state).items()}
        for state in (load_weights(tmp_path / name, abstract) for name in ("whole", "broken"))
    )
    start = jax.device_get(random_weights(whole, layout_of(whole)))
    assert one.keys() == {path for path in start if not is_lora(path)}
    for path, array in one.items():
        np.testing.assert_array_equal(array, two[path], err_msg=path)
        assert array.dtype == np.float32
    moved = {path for path in one if np.abs(one[path] - start[path].astype(np.float32)).max() > 0}
    assert moved == {kernel_of(path) for path in start if is_lora(path)}


def test_a_run_is_imported_exported_and_trained_again(tmp_path):
    model = exportable(lora=released_lora())
    narrow = {"parameters": lora_only(), "frozen_dtype": "bfloat16"}
    first = tiny.train_config(tmp_path / "run", model=model, steps=3, **narrow)
    run(first)

    import_run(tmp_path / "run", tmp_path / "ours")
    assert read_model(tmp_path / "ours") == exportable()
    leaves = open_weights(tmp_path / "ours")
    kinds = {leaf.dtype.name for path, leaf in leaves.items() if path.endswith(".kernel")}
    assert kinds == {"bfloat16"}, "what was frozen in half the bytes is not widened"
    export_released(tmp_path / "ours", tmp_path / "released", dtype="keep")
    _, abstract = abstract_state(exportable(), make_mesh())
    folders = [load_weights(tmp_path / name, abstract) for name in ("run", "ours", "released")]
    arrays = [{p: v.get_value() for p, v in named_variables(state).items()} for state in folders]
    for path, array in arrays[0].items():
        np.testing.assert_array_equal(arrays[1][path], array, err_msg=path)
        np.testing.assert_array_equal(arrays[2][path], array, err_msg=path)

    again = dataclasses.replace(first, run_dir=str(tmp_path / "again"), init=first.run_dir, steps=3)
    layout = layout_of(again)
    weights = initial_weights(again, layout)
    assert float(jnp.abs(weights["decoder.blocks.mlp.up_proj.lora.up"]).max()) == 0.0
    path = "decoder.blocks.mlp.up_proj.kernel"
    np.testing.assert_array_equal(weights[path], arrays[0][path])


def test_a_runs_adapter_gives_the_released_model_what_the_run_has(tmp_path):
    """By way of PEFT's format and the reader of it, which was checked against PEFT itself."""
    tower = ("vit.blocks.attn.q_proj", "vit.blocks.attn.v_proj", "vit.blocks.mlp.*")
    targets = ("decoder.blocks.*", *tower)
    model = exportable(lora=LoraConfig(rank=3, alpha=6.0, targets=targets))
    _, abstract = abstract_state(exportable(), make_mesh())
    base = draw_state(exportable(), jax.random.key(1), abstract)
    save_weights(tmp_path / "base", exportable(), base)
    export_released(tmp_path / "base", tmp_path / "released")
    config = tiny.train_config(
        tmp_path / "run",
        model=model,
        parameters=lora_only(with_embeddings=True),
        optimizer=OptimizerConfig(peak_lr=0.3, end_lr=0.3, warmup_steps=0),
        init=str(tmp_path / "base"),
        steps=3,
    )
    run(config)

    assert main(["adapter", str(tmp_path / "run"), str(tmp_path / "adapter")]) == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {"attn.in_proj": 6, "attn.c_attn": 9}
    assert settings["modules_to_save"] == ["transformer.wte", "lm_head"]
    import_released(tmp_path / "released", tmp_path / "joined", lora=tmp_path / "adapter")
    import_run(tmp_path / "run", tmp_path / "folded")
    folders = [load_weights(tmp_path / name, abstract) for name in ("joined", "folded", "base")]
    joined, folded, before = (
        {p: np.asarray(v.get_value()) for p, v in named_variables(state).items()}
        for state in folders
    )
    changed = set()
    for path, array in folded.items():
        np.testing.assert_allclose(joined[path], array, rtol=1e-5, atol=1e-5, err_msg=path)
        if np.abs(array - before[path]).max() > 0.02:
            changed.add(path)
    assert "decoder.blocks.attn.k_proj.kernel" in changed
    assert "vit.blocks.attn.v_proj.kernel" in changed
    assert "vit.blocks.attn.k_proj.kernel" not in changed
    assert "decoder.lm_head.kernel" in changed


def test_runs_without_an_adapter_are_told(tmp_path, capsys):
    config = tiny.train_config(tmp_path / "whole", steps=3)
    run(config)
    assert main(["adapter", str(tmp_path / "whole"), str(tmp_path / "a")]) == 2
    assert "was trained without LoRA" in capsys.readouterr().err
    odd = tiny.model_config(lora=LoraConfig(rank=1, targets=("vit.patch_embed",)))
    run(tiny.train_config(tmp_path / "odd", model=odd, parameters=lora_only(), steps=3))
    assert main(["adapter", str(tmp_path / "odd"), str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert "transformer.visual.conv1.weight is no matrix of a module that PEFT can change" in said
    assert main(["adapter", str(tmp_path), str(tmp_path / "a")]) == 2
    assert "is no training run" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"rank=8, targets=\(\)"):
        LoraConfig(rank=8)
    with pytest.raises(ConfigError, match=r"rank=-1"):
        LoraConfig(rank=-1)
    with pytest.raises(ConfigError, match=r"rank of 0 and no more.* got rank=0, targets=\('vit"):
        LoraConfig(targets=("vit.*",))
    with pytest.raises(ConfigError, match=r"dropout has no effect: got 0.1 together with rank=0"):
        LoraConfig(dropout=0.1)
    wrong = LoraConfig(rank=2, targets=("decoder.blocks.attention.*",))
    with pytest.raises(ConfigError, match=r"attention.*matches no matrix.*decoder.blocks.attn.k"):
        abstract_state(tiny.model_config(lora=wrong))
    head = LoraConfig(rank=2, targets=("decoder.lm_head",))
    with pytest.raises(ConfigError, match="matches no matrix"):
        abstract_state(tiny.model_config(lora=head))
    with pytest.raises(ConfigError, match=r"'\*\.lora\.\*' matches no parameter"):
        layout_of(lora_config(lora=LoraConfig()))
    both = dataclasses.replace(lora_config(), parameters=(ParameterRule("*"),))
    with pytest.raises(ConfigError, match=r"kernel and \d+ more would train beside a LoRA pair"):
        layout_of(both)


def test_the_released_sizes_at_full_size():
    config = read_config("configs/finetune_lora.py")
    _, abstract = abstract_state(config.model)
    plan = plan_parameters(abstract, config.parameters)
    sizes = {path: v.get_value().size for path, v in named_variables(abstract).items()}
    trained = {path: sizes[path] for path, row in plan.items() if row.is_trained}
    # The original's one pair of c_attn, 64 x (4096 + 3 x 4096), is three here.
    released = 112_197_632
    more = 32 * 64 * (3 * 2 * 4096 - 4 * 4096)
    assert sum(trained.values()) == released + more
    assert sum(sizes.values()) - sum(trained.values()) == 9_656_935_168
    assert "128,974,848" in describe_plan(abstract, plan)

    base_model = plan_parameters(abstract, lora_only(with_embeddings=True))
    added = {path for path, row in base_model.items() if row.is_trained} - set(trained)
    assert sum(sizes[path] for path in added) == 1_244_659_712

    # Two thirds of what training the decoder costs, and the pairs.
    record = {"tokens": 1000, "images": 0, "pairs": 0}
    count = step_flops(config.model, abstract, plan, 448)
    _, plain = abstract_state(qwen_vl())
    everything = plan_parameters(plain, (ParameterRule("*"),))
    full = step_flops(qwen_vl(), plain, everything, 448)
    pairs = 6.0 * 1000 * sum(trained.values())
    assert count(record) == pytest.approx(full(record) * 2 / 3 + pairs, rel=1e-6)


# --- dropout ------------------------------------------------------------------------------------


def test_dropout_leaves_out_a_share_and_keeps_the_mean():
    x = jnp.ones((400, 50))
    assert dropout(x, 0.3, 0) is x, "no key was lent"
    with noise(jax.random.key(0)):
        assert dropout(x, 0.0, 0) is x
        one, again, other = dropout(x, 0.3, 0), dropout(x, 0.3, 0), dropout(x, 0.3, 1)
    np.testing.assert_array_equal(one, again)
    assert set(np.unique(one)) == {0.0, np.float32(1 / 0.7)}
    assert abs(np.mean(one) - 1) < 0.02
    assert 0.3 < np.mean(np.asarray(one) != other) < 0.54  # 2 x 0.3 x 0.7 of them


def test_layers_drop_differently_with_and_without_a_loop():
    """Equal layers that only drop: what is left of a one after two of them says what each did."""

    class Dropper(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(()), axes=())

    layers = stack_layers(lambda rngs: Dropper(), 2, nnx.Rngs(0))

    def left(dtype, remat):
        @jax.jit
        def run(x):
            with noise(jax.random.key(1)):
                step = lambda layer, x: x + dropout(jnp.ones_like(x), 0.5, 0) * layer.weight[...]  # noqa: E731
                return scan_layers(layers, step, x, remat=remat)

        return np.asarray(run(jnp.zeros(1000, dtype)), np.float32)

    looped = left("float32", "none")
    shares = [np.mean(looped == value) for value in (0.0, 2.0, 4.0)]
    np.testing.assert_allclose(shares, (0.25, 0.5, 0.25), atol=0.06)
    np.testing.assert_array_equal(left("bfloat16", "dots"), looped)  # unrolled on a CPU


def test_a_share_that_cannot_be_is_told():
    with pytest.raises(ConfigError, match=r"LoraConfig\.dropout must be in \[0, 1\): got 1\.5"):
        dataclasses.replace(EVERYWHERE, dropout=1.5)


def test_queries_keys_and_values_drop_the_same():
    config = lora_config().model
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0)))
    numbers = {
        ".".join(map(str, path[:-1])): pair.number
        for path, pair in nnx.iter_modules(model)
        if isinstance(pair, LowRank)
    }
    blocks = {path.rpartition(".")[2]: n for path, n in numbers.items() if "decoder" in path}
    assert blocks["q_proj"] == blocks["k_proj"] == blocks["v_proj"]
    assert len(set(blocks.values())) == len(blocks) - 2
    assert set(blocks.values()).isdisjoint(n for p, n in numbers.items() if "decoder" not in p)
