"""What docs/metrics.md says that a stage writes."""

import re
from pathlib import Path

METRICS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


def documented(section: str) -> set[str]:
    found = re.search(rf"^### {section}\n(.*?)(?=^##|\Z)", METRICS, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^\| `([^`]+)` \|", found.group(1), re.MULTILINE)) if found else set()
