# SPDX-License-Identifier: Apache-2.0
"""Every touch of what vLLM, torch and JAX do not promise to keep. Verified with vLLM 0.32.0, torch 2.13 and JAX 0.10.2.

| what | where | why | until |
|---|---|---|---|
| `torch.accelerator` made no-ops | `lowering.quiet_torch_accelerator` | vLLM calls it at shutdown and while loading; it fails once torchax is imported | vLLM asks the platform instead |
| `vllm.envs.environment_variables` extended | `envs.register_with_vllm` | else our variables are warned about and not forwarded by Ray | vLLM has a registration call |
| `VLLM_XLA_USE_SPMD=1` | `env_override` | else vLLM defaults to one process a device | vLLM lets a platform choose its executor |
| `DefaultModelLoader._prepare_weights` | `checkpoints.weight_files` | the one place that knows hubs, revisions and which files count | it is public |
| `ModelRegistry.register_model` with a class never built | `checkpoints.declare_architecture` | vLLM asks a PyTorch class what a model can do | a platform can answer |
| `get_engine_process_shutdown_timeout` wrapped | `processes.grant_engine_shutdown_grace` | SIGTERM with requests running kills the engine at once, and the server hangs | the grace is not ROCm's alone |
| `gc.freeze` at exit | `processes.skip_the_last_collection` | the interpreter collects garbage once more when a process ends, long after SIGTERM | vLLM's processes freeze it themselves |
| `terminate_if_errored` of the API server wrapped | `processes.exit_with_error_when_engine_dies` | the server exits with 0 when its engine has died, which supervisors take for success | it exits with an error |
| `VLLM_WORKER_MULTIPROC_METHOD` | `processes.choose_start_method` | vLLM forks the engine unless CUDA has started; it does not look at JAX | it asks the platform |
| `import torchax` | `lowering.import_torchax` | torchax 0.0.13 names ATen overloads that torch 2.13 has dropped | a torchax made for torch 2.13 |
| `Tensor.type_as` of torchax | `lowering.import_torchax` | torchax 0.0.13 changes the tensor itself, and knows no views | torchax returns another |
| `transformers_moe_forward` by its Python function | `lowering.operations_that_call_modules` | torch's dispatcher leaves torchax before the experts are called | it is a method again |
| DBRX's experts renamed | `checkpoints.as_loader_looks_for` | vLLM's class loads them by the names of before they became a module's | its `load_weights` finds them |
| which layers a quantization leaves out | `fp8_skips`, `quantization.awq_skips`, `quantization.gptq_skips`, `quantization.modelopt_skips`, `quantization.online_skips`, `quantization.compressed_tensors_target` | vLLM asks with its own modules at hand | a config answers for a name |
| one torch process, whole weights | `lowering.start_torch_alone` | vLLM's layers ask their process group how far they are divided; JAX divides them instead | layers take it from the config |
| `ModelConfig.use_mla` says no | `checkpoints.latents_put_up` | vLLM's classes of latent attention would ask for a backend of it; in their multi-head form they ask for ours | a class can be told |
| `vllm.ir` without its torch wrap | `lowering.start_torch_alone` | a custom op of torch's registry hides the arithmetic from torchax | torchax lowers `vllm_ir` ops |
| loading of custom logits processors | `sampling.custom_logits_processors` | vLLM drops them silently for TPU; the runner serves them | a platform can say that it does |
| `prometheus_client.mmap_dict` | `observing.MetricFile` | the engine's metrics, in the files that prometheus_client's public collector reads | it has a writer that is not chosen by a variable at import |
| `ProfilerSession` of jaxlib | `observing.start_trace`, `observing.stop_trace`, `observing.write_trace` | `jax.profiler.stop_trace` writes whatever size the trace has; here it is known before | JAX can limit a trace |
| `get_file_cache` of JAX's compilation cache wrapped | `observing.use_jax_cache` | its entries are written in place, read unchecked and never replaced | JAX takes a cache of one's own |
| `ThinkingBudgetStateHolder`, one a request | `sampling.thinking_budget_state` | the state behind `thinking_token_budget` is part of vLLM's own sampler | it is public |
"""
