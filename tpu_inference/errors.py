# SPDX-License-Identifier: Apache-2.0
"""Errors of this package."""


class TpuInferenceError(Exception):
    """Base of all errors raised here: says what, why and what to do."""


class ConfigError(TpuInferenceError, ValueError):
    """A setting that is wrong or not served."""
