# SPDX-License-Identifier: Apache-2.0
"""The engine that a server would start on a slice: its configuration, abstract model and programs, without the slice."""

from dataclasses import dataclass
from typing import Any

from tpu_inference import tpu_info
from tpu_inference.errors import ConfigError
from tpu_inference.plan.arguments import Question
from tpu_inference.plan.slices import TpuSlice
from tpu_inference.runner.tpu_runner import TPUModelRunner
from tpu_inference.tpu_info import Detection


@dataclass(frozen=True, eq=False)
class Engine:
    """A model runner whose parameters are shapes, and what it was made from."""

    slice: TpuSlice
    tensor_parallel: int
    runner: TPUModelRunner
    weights_per_device: int

    @property
    def config(self) -> Any:
        """vLLM's, as the platform left it."""
        return self.runner.vllm_config


def server_config(question: Question, where: TpuSlice, tensor_parallel: int) -> Any:
    """vLLM's configuration of `vllm serve` with these options on this slice, with its defaults.

    Raises:
        ConfigError: what a server would refuse.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    here = Detection("tpu", "the planner was asked about it", where.chip, where.num_chips)
    with tpu_info.assuming(here):
        try:
            return EngineArgs(
                model=question.model,
                tensor_parallel_size=tensor_parallel,
                skip_tokenizer_init=True,
                load_format="dummy",
                **question.engine,
            ).create_engine_config(UsageContext.OPENAI_API_SERVER)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(_plainly(error)) from None


def _plainly(error: Exception) -> str:
    """The message without pydantic's frame around it."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith("For further information")]
    if len(kept) > 1 and "validation error" in kept[0]:
        kept = kept[1:]
    return " ".join(kept).removeprefix("Value error, ").split(" [type=")[0]


def build_engine(config: Any, where: TpuSlice) -> Engine:
    """Everything up to where a server would load the weights. Loads libtpu.

    Raises:
        TpuInferenceError: the model has a field that is not served.
    """
    import jax

    from tpu_inference.layers.common.sharding import make_mesh, shard_bytes
    from tpu_inference.models.common.vllm_loader import abstract_model
    from tpu_inference.worker.tpu_worker import KV_CACHE_LAYOUT

    tensor_parallel = config.parallel_config.tensor_parallel_size
    config.cache_config.kv_cache_layout = KV_CACHE_LAYOUT
    mesh = make_mesh(where.devices(), tensor_parallel)
    runner = TPUModelRunner(config, mesh, on_tpu=True)
    runner.functions = abstract_model(config, mesh)
    return Engine(where, tensor_parallel, runner, sum(map(shard_bytes, jax.tree.leaves(runner.functions.params))))
