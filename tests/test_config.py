# SPDX-License-Identifier: Apache-2.0
"""Settings from additional_config."""

import pytest

from tpu_inference.config import TpuConfig
from tpu_inference.errors import ConfigError


def test_values_and_defaults():
    assert TpuConfig.parse({}) == TpuConfig.parse(None) == TpuConfig(None, None)
    assert TpuConfig.parse({"token_buckets": [1, 8], "scan_layers": True}) == TpuConfig((1, 8), True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 1}, r"unknown keys \['tokens'\].*token_buckets"),
        ({"token_buckets": [8, 1]}, "token_buckets.*increases"),
        ({"token_buckets": [0]}, "token_buckets.*positive"),
        ({"scan_layers": "yes"}, "scan_layers.*true or false"),
        ([1], "dictionary"),
    ],
)
def test_what_is_wrong_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        TpuConfig.parse(settings)
