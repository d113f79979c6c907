# SPDX-License-Identifier: Apache-2.0
"""What the runner of a server still knows of requests: a worker extension of the tests, for `--worker-extension-cls`."""


class LiveState:
    """Methods that vLLM's `collective_rpc` reaches, over HTTP with VLLM_SERVER_DEV_MODE=1 only."""

    def live_state(self) -> dict[str, int]:
        """Counts that are all zero when no request is there."""
        runner = self.model_runner
        return {
            "slots": len(runner.states.slots),
            "requests": len(runner.states.requests),
            "prompts whose logprobs are gathered": len(runner.prompt_logprobs._collected),
            "steps without an end": int(runner._pending is not None),
        }
