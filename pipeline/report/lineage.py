"""The lineage diagram: every stage as a box with its fingerprint, and an arrow from each that it was made from.

Stages stand in columns by how many stages lie before them, those of one column below each other. The diagram is drawn
along u, across v: u is x on a wide page and y on a narrow one.
"""

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from threefold.display.parts import Table
from threefold.report.run import FRESH, Run
from threefold.stages import STAGES

STATES = {
    "fresh": "up to date",
    "stale": "other configuration",
    "outdated": "outdated",
    "missing": "not made",
    "unlinked": "made elsewhere",
    "failed": "failed",
    "interrupted": "interrupted",
    "running": "running",
}


@dataclass(frozen=True)
class Frame:
    """Sizes of one orientation: of a box and of the gaps along u and across v, and the room for arcs before v = 0."""

    name: str
    along: int
    across: int
    gap: int
    aside: int
    arcs: int
    turned: bool  # whether u is y

    def place(self, u: float, v: float) -> str:
        """A point as x and y."""
        return f"{v:g} {u:g}" if self.turned else f"{u:g} {v:g}"


FRAMES = (Frame("wide", 116, 62, 24, 22, 64, False), Frame("narrow", 62, 132, 22, 14, 58, True))


def state(run: Run, stage: str) -> str:
    """One word of `STATES`."""
    if stage in run.outdated:
        return "outdated"
    return run.states[stage].word if stage in run.states else FRESH


def table(run: Run) -> Table:
    """The diagram as a table."""
    rows: list[tuple[str, ...]] = [("stage", "fingerprint", "state", "made from", "made", "peak memory")]
    data = []
    for stage in columns(run):
        manifest = run.manifests.get(stage, {})
        row: dict[str, Any] = {
            "stage": stage,
            "fingerprint": manifest.get("fingerprint", ""),
            "state": STATES[state(run, stage)],
            "made_from": " ".join(run.parents(stage)),
            "made": manifest.get("created", ""),
            "peak_memory_bytes": manifest.get("peak_memory_bytes"),
        }
        memory = f"{manifest['peak_memory_bytes'] / 1e6:,.0f} MB" if manifest else "–"
        made_from, made = ", ".join(run.parents(stage)), row["made"].replace("T", " ")
        rows.append((stage, row["fingerprint"], row["state"], made_from, made, memory))
        data.append(row)
    return Table("lineage", "Lineage as a table", rows, data, texts=5, folded=True)


def columns(run: Run) -> dict[str, int]:
    """The column of each stage that the run has or is asked for: the longest way to it."""
    column: dict[str, int] = {}
    for stage in STAGES:
        if run.asks_for(stage):
            column[stage] = 1 + max((column[parent] for parent in run.parents(stage) if parent in column), default=-1)
    return column


def places(run: Run) -> dict[str, tuple[int, int]]:
    """Column and row of each stage; the stage of a column on which more stages depend stands first."""
    column, taken, place = columns(run), {}, {}
    uses = {stage: sum(stage in run.parents(other) for other in column) for stage in column}
    for stage in sorted(column, key=lambda name: -uses[name]):
        row = taken[column[stage]] = taken.get(column[stage], -1) + 1
        place[stage] = (column[stage], row)
    return {stage: place[stage] for stage in column}


def diagram(run: Run, frame: Frame) -> Markup:
    """The whole diagram as SVG in one orientation."""
    at = places(run)
    spans = [at[stage][0] - at[parent][0] for stage in at for parent in run.parents(stage) if parent in at]
    room = frame.arcs if max(spans, default=0) > 1 else 6
    length = (1 + max(c for c, _ in at.values())) * (frame.along + frame.gap) - frame.gap
    width = room + (1 + max(r for _, r in at.values())) * (frame.across + frame.aside) - frame.aside
    left, top = frame.place(-2, -room).split()
    wide, high = frame.place(length + 4, width + 4).split()
    arrows = [arrow(frame, at[parent], at[stage]) for stage in at for parent in run.parents(stage) if parent in at]
    boxes = [box(run, frame, stage, place) for stage, place in at.items()]
    marker = (
        f'<marker id="tip-{frame.name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0.8L7 4L0 7.2Z"/></marker>'
    )
    return Markup(
        f'<svg class="lineage {frame.name}" viewBox="{left} {top} {wide} {high}" style="max-width:{wide}px" role="img" '
        f'aria-label="{escape(spoken(run))}"><defs>{marker}</defs>{"".join(arrows)}{"".join(boxes)}</svg>'
    )


def spoken(run: Run) -> str:
    """The diagram in words, for those who hear it."""
    return "; ".join(
        f"{stage} ({STATES[state(run, stage)]}){' from ' + ', '.join(run.parents(stage)) if run.parents(stage) else ''}"
        for stage in columns(run)
    )


def box(run: Run, frame: Frame, stage: str, place: tuple[int, int]) -> str:
    """One stage: name, fingerprint, and its state or time."""
    u, v = place[0] * (frame.along + frame.gap), place[1] * (frame.across + frame.aside)
    x, y = frame.place(u, v).split()
    wide, high = frame.place(frame.along, frame.across).split()
    word, manifest = state(run, stage), run.manifests.get(stage)
    last = f"{manifest['seconds']:,.0f} s" if manifest and word == FRESH else STATES[word]
    texts = {"name": (20, stage), "print": (37, manifest["fingerprint"] if manifest else "–"), "note": (53, last)}
    lines = [
        f'<text class="{kind}" x="{float(wide) / 2:g}" y="{down}">{escape(text)}</text>'
        for kind, (down, text) in texts.items()
    ]
    return (
        f'<g class="stage {word}" transform="translate({x} {y})"><rect width="{wide}" height="{high}" rx="8"/>'
        f"{''.join(lines)}</g>"
    )


def arrow(frame: Frame, start: tuple[int, int], end: tuple[int, int]) -> str:
    """An arrow from the box at `start` (column, row) to that at `end`: straight, bent, or an arc past boxes."""
    step, side, span = frame.along + frame.gap, frame.across + frame.aside, end[0] - start[0]
    u1, u2 = start[0] * step, end[0] * step
    v1, v2 = (row * side + frame.across / 2 for row in (start[1], end[1]))
    at, passing = frame.place, ""
    if start[1] == end[1] and span == 1:
        path = f"M{at(u1 + frame.along, v1)}L{at(u2, v2)}"
    elif start[1] == end[1]:
        # arcs of different spans leave and arrive beside each other
        out, back, high = u1 + frame.along * (0.5 + 0.06 * span), u2 + frame.along * (0.5 - 0.07 * span), -12 * span
        path, passing = f"M{at(out, v1 - frame.across / 2)}C{at(out, high)},{at(back, high)},{at(back, 0)}", " passing"
    elif start[1] < end[1]:
        middle = u1 + frame.along / 2
        path = f"M{at(middle, v1 + frame.across / 2)}C{at(middle, v2)},{at(middle, v2)},{at(u2, v2)}"
    else:
        middle = u2 + frame.along / 2
        path = f"M{at(u1 + frame.along, v1)}C{at(middle, v1)},{at(middle, v1)},{at(middle, v2 + frame.across / 2)}"
    return f'<path class="arrow{passing}" d="{path}" marker-end="url(#tip-{frame.name})"/>'
