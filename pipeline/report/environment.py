"""What the run was made with: libraries and device of each stage, and every key that its fingerprints cover."""

from typing import Any

from threefold.display.parts import Section, Table
from threefold.report.run import Run


def section(run: Run) -> Section:
    """Both as tables."""
    made = sorted(manifest["created"] for manifest in run.manifests.values())
    lead = f"Made between {made[0].replace('T', ' ')} and {made[-1].replace('T', ' ')}, local time of the machine."
    return Section("environment", "Environment and configuration", (lead,), parts=(environments(run), keys(run)))


def environments(run: Run) -> Table:
    """Each property of the environment with the stages that were made so."""
    stages_by_value: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in run.manifests.items():
        for name, value in manifest["environment"].items():
            stages_by_value.setdefault((name, value), []).append(stage)
    data = [
        {"what": name, "value": value, "stages": _listed(run, s)}
        for (name, value), s in sorted(stages_by_value.items())
    ]
    rows = [tuple(row.values()) for row in data]
    return Table("environment", "Environment", [("what", "value", "stages"), *rows], data, texts=3)


def keys(run: Run) -> Table:
    """Each key that a fingerprint covers with its value and the stages that see it."""
    data = [
        {"key": key, "value": value, "stages": _listed(run, stages)}
        for (key, value), stages in sorted(covered(run).items())
    ]
    rows = [tuple(row.values()) for row in data]
    title = f"Configuration: {len(rows)} keys that the fingerprints cover"
    return Table("configuration", title, [("key", "value", "stages"), *rows], data, texts=3, folded=True)


def covered(run: Run) -> dict[tuple[str, str], list[str]]:
    """(key, value as text) → the stages whose fingerprint covers it so; parents and versions are left out."""
    stages_by_value: dict[tuple[str, str], list[str]] = {}
    for stage, manifest in run.manifests.items():
        for key, value in manifest["parts"].items():
            if not key.startswith("parent.") and key != "version":
                stages_by_value.setdefault((key, as_text(value)), []).append(stage)
    return stages_by_value


def as_text(value: Any) -> str:
    """A value as it is written in an override."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, list):
        return f"[{', '.join(map(as_text, value))}]"
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _listed(run: Run, stages: list[str]) -> str:
    return "all" if len(stages) == len(run.manifests) else ", ".join(stages)
