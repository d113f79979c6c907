# SPDX-License-Identifier: Apache-2.0
"""The committed reports, one file an op and chip, and the page made from them."""

import json
from collections.abc import Iterable
from pathlib import Path

from tpu_inference.tools.kernel_report.measure import Report
from tpu_inference.tools.kernel_report.render import as_tables, replace_region

PAGE = Path("docs/kernels.md")


def read(directory: Path) -> list[Report]:
    """All reports of a directory."""
    files = sorted(directory.glob("*.json"))
    return [Report.from_json(data) for path in files for data in json.loads(path.read_text(encoding="utf-8")).values()]


def write(directory: Path, report: Report) -> Path:
    """Put a report into its file, in place of an older one of the same shape."""
    path = directory / f"{report.op}_{report.chip}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stored[report.shape] = report.to_json()
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return path


def page(text: str, reports: Iterable[Report]) -> str:
    """The text of docs/kernels.md with the tables of `reports`."""
    return replace_region(text, as_tables(reports))


def update_page(directory: Path, path: Path = PAGE) -> bool:
    """Rewrite the page's tables from a directory's reports; whether there is a page."""
    if not path.exists():
        return False
    path.write_text(page(path.read_text(encoding="utf-8"), read(directory)), encoding="utf-8")
    return True
