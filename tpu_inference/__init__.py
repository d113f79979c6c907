# SPDX-License-Identifier: Apache-2.0
"""Entry points that vLLM calls. Importing this module loads nothing heavy, touches no device and patches nothing."""


def tpu_platform_plugin() -> str | None:
    """Entry point of `vllm.platform_plugins`: the platform class to use.

    vLLM calls it twice in every process, so it only names the class; which device there is, is found when the class is made.
    """
    try:
        from tpu_inference.env_override import apply

        apply()
    except Exception:
        # vLLM logs a failing entry point at DEBUG and goes on without it: say so where it is seen.
        from tpu_inference.logger import init_logger

        init_logger(__name__).exception("tpu_inference failed while vLLM looked for its platform; it will not be used")
        raise
    return "tpu_inference.platforms.tpu_platform.TpuPlatform"


def register() -> None:
    """Entry point of `vllm.general_plugins`: tell vLLM, in every process, of our environment variables and of what is served without its images."""
    from tpu_inference import envs
    from tpu_inference.models.common.registry import declare_text_only

    envs.register_with_vllm()
    declare_text_only()
