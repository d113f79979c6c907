# SPDX-License-Identifier: Apache-2.0
"""`python -m tpu_inference.plan`: whether a model fits a TPU slice, how many requests it holds and what a step costs, without a TPU.

The engine's own programs are built from a config alone and compiled ahead of time; nothing is loaded and nothing runs.
"""
