# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's tests run (selection.toml): files to look into, and what of them is not applicable, with why."""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
REFUSAL = "tpu_inference does not serve this yet"


def _first(patterns: tuple[tuple[str, str], ...], test: str) -> str | None:
    escape = str.maketrans({"[": "[[]"})  # a part of ids, not of a pattern
    return next((why for pattern, why in patterns if fnmatchcase(test, pattern.translate(escape))), None)


@dataclass(frozen=True)
class Selection:
    files: tuple[str, ...]
    """Globs below vLLM's sources."""
    not_applicable: tuple[tuple[str, str], ...]
    """(glob of a test id, or of a file, why)"""
    refusals: tuple[tuple[str, str], ...]
    """(part of the platform's message when it refuses a configuration, why)"""
    messages: tuple[tuple[str, str], ...]
    """(part of a message of another's, why)"""
    explained: tuple[tuple[str, str], ...]
    """(glob of a test that fails, why)"""
    together: tuple[str, ...]
    """Globs of files that start no engine: those of a glob share a process."""

    @staticmethod
    @lru_cache
    def load() -> "Selection":
        data = tomllib.loads((HERE / "selection.toml").read_text())
        causes = data["causes"]
        patterns = [
            (f"tests/{pattern}", causes[key]) for key, listed in data["not_applicable"].items() for pattern in listed
        ]
        refusals, messages = (
            tuple((text, causes[key]) for key, texts in data[table].items() for text in texts)
            for table in ("refused", "failing_with")
        )
        explained = tuple((f"tests/{pattern}", why) for pattern, why in data["explained"].items())
        files, together = (tuple(f"tests/{glob}" for glob in data[key]) for key in ("files", "together"))
        return Selection(files, tuple(patterns), refusals, messages, explained, together)

    def cause(self, test: str) -> str | None:
        """Why a test, or all of a file, is not applicable."""
        return _first(self.not_applicable, test)

    def explanation(self, test: str) -> str | None:
        """Why a test fails, where that is known."""
        return _first(self.explained, test)

    def refused(self, failure: str) -> str | None:
        """Why a test that failed with this message is not applicable after all: it asked for what there is not, or what the platform refuses."""
        known = (*self.messages, *(self.refusals if REFUSAL in failure else ()))
        return next((why for text, why in known if text in failure), None)

    def find(self, sources: Path) -> list[str]:
        """The test files, relative to vLLM's sources, in the order of `files`."""
        found = [str(path.relative_to(sources)) for glob in self.files for path in sorted(sources.glob(glob))]
        return list(dict.fromkeys(found))

    def group(self, files: list[str]) -> list[list[str]]:
        """The files of which something may be applicable, those that share a process together."""
        groups: dict[str, list[str]] = {}
        for file in files:
            if self.cause(file) is None:
                groups.setdefault(next((glob for glob in self.together if fnmatchcase(file, glob)), file), []).append(
                    file
                )
        return list(groups.values())
