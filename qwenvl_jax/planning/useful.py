"""The floating-point work that a step needs when all its places are taken: what MFU counts."""

from qwenvl_jax.config import TrainConfig
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.training.flops import full_step_flops
from qwenvl_jax.training.optimizer import plan_parameters


def useful_flops(config: TrainConfig, tensor: int = 1) -> float:
    """Returns the work of one optimizer step over the whole batch, all chips together.

    By the convention of `training.flops`, with every token and every picture slot of a row in use,
    and rows of one sample: padding is computed too, so the plan of a step has to count it. With
    `tensor`, the work of one of so many chips that split the model, what they do not divide whole.
    """
    _, abstract = abstract_state(config.model)
    plan = plan_parameters(abstract, config.parameters)
    return full_step_flops(config, abstract, plan, tensor)
