# SPDX-License-Identifier: Apache-2.0
"""vLLM's own tests, run against this platform: `python -m vllm_tests` with scripts/ on PYTHONPATH (see docs/vllm_tests.md)."""
