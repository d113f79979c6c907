# SPDX-License-Identifier: Apache-2.0
"""Loggers below vLLM's: formatted, coloured and filtered as vLLM's own, without importing vLLM."""

import logging

_seen: set[tuple[str, str]] = set()


def init_logger(name: str) -> logging.Logger:
    """The logger of module `name`, below vLLM's logger, which holds the handlers and the level."""
    return logging.getLogger(f"vllm.{name}")


def log_once(logger: logging.Logger, level: int, message: str, *args: object) -> None:
    """Log a message the first time this process has it to say, as from the caller's caller."""
    key = (logger.name, message % args)
    if key not in _seen:
        _seen.add(key)
        logger.log(level, message, *args, stacklevel=3)
