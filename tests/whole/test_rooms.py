"""The house: a room imports only rooms below it, no module comes round to itself, and rooms stay small."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = {"threefold": "pipeline", "threefold.stages": "stages", "threefold.rewards": "rewards"}
# from the ground up; what stands in `pipeline/` itself is the ground, but for the door
FLOORS = (
    "ground", "display", "models", "data", "schema", "sampling", "artifacts", "rewards", "tracking", "execution",
    "training", "ppo", "evaluation", "stages", "config", "chain", "labelling", "slurm", "runs", "report", "talk",
    "door",
)  # fmt: skip
HEAVY = ("torch", "transformers", "sklearn", "scipy.stats", "pandas")  # each takes a third of a second and more
DOOR = ("threefold", "threefold.api", "threefold.arguments", "threefold.cli", "threefold.__main__")
# rooms, files and modules that are answered from within a second
LIGHT = (
    "threefold", "threefold.api", "threefold.cli", "threefold.config.compose", "threefold.chain",
    "threefold.slurm.submission",
    "threefold.slurm.job_records", "threefold.runs.sweep_space", "threefold.labelling.page", "threefold.talk.command",
    "threefold.report", "threefold.stages", "threefold.rewards",
)  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Our modules by name, but for empty ones."""
    found = {}
    for package, folder in PLACES.items():
        for file in (ROOT / folder).rglob("*.py"):
            name = ".".join([package, *file.relative_to(ROOT / folder).with_suffix("").parts])
            if file.stat().st_size:
                found[name.removesuffix(".__init__")] = file
    return found


@cache
def imports() -> dict[str, set[str]]:
    """The modules of ours that each module imports, anywhere in it."""
    return {name: imported(ast.parse(file.read_text())) - {name} for name, file in modules().items()}


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules() else node.module for name in names if name != "threefold.conf"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(modules())


def room(module: str) -> str:
    if module in DOOR:
        return "door"
    inner = module.split(".")[1:2]
    return inner[0] if inner and inner[0] in FLOORS else "ground"


def plan() -> str:
    """The floor plan as text: each room with its files, lines and the rooms that it imports."""
    lines = []
    for name in reversed(FLOORS):
        here = [module for module in modules() if room(module) == name]
        length = sum(len(modules()[module].read_text().splitlines()) for module in here)
        below = sorted({room(other) for module in here for other in imports()[module]} - {name}, key=FLOORS.index)
        lines.append(f"{name:<11} {len(here):>3} files {length:>6,} lines  imports {', '.join(reversed(below))}")
    arrows = {(room(module), room(other)) for module, others in imports().items() for other in others}
    return "\n".join([*lines, f"{len(FLOORS)} rooms, {sum(a != b for a, b in arrows)} arrows"])


def test_a_room_imports_only_rooms_below_it():
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if FLOORS.index(room(other)) > FLOORS.index(room(module))
    ]
    assert not upward, "\n".join([*upward, plan()])
    assert len(FLOORS) <= 25, plan()


def test_every_room_stands_on_a_floor():
    rooms = {folder.name for folder in (ROOT / "pipeline").iterdir() if (folder / "__init__.py").exists()}
    assert rooms | {"ground", "door", "stages", "rewards"} == set(FLOORS)


def test_no_module_comes_round_to_itself():
    def reached(module: str) -> set[str]:
        seen, waiting = set(), list(imports()[module])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += imports()[other]
        return seen

    circles = sorted(module for module in modules() if module in reached(module))
    assert not circles, f"in circles: {', '.join(circles)}\n{plan()}"


def test_files_and_functions_stay_short_and_the_corridor_empty():
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 8
    for name, file in modules().items():
        text = file.read_text()
        assert len(text.splitlines()) <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{name}: {node.name}"


@pytest.mark.parametrize("module", LIGHT)
def test_what_answers_at_once_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


if __name__ == "__main__":
    print(plan())
