"""What README and docs name exists: commands, paths, keys, metrics."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from documents import documented

from threefold import cli
from threefold.config.compose import compose
from threefold.config.names import keys
from threefold.fileio import read_json, read_lines
from threefold.runs import sweep_space
from threefold.stages import STAGES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PPO = (ROOT / "docs/ppo.md").read_text()
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
DOCS = "\n".join(
    page.read_text() for page in PAGES if page.stem not in ("log", "CONTRIBUTING", "CHANGELOG")
)  # all whose commands and keys must exist

MAKEFILE = (ROOT / "Makefile").read_text()


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|^    )make ([a-z][a-z-]*)", DOCS, re.MULTILINE))))
def test_every_make_command_of_the_readme_exists(target):
    assert target in make_targets()


def test_every_make_target_is_in_the_readme_and_in_its_own_list():
    for target in make_targets() - {"help", "install"}:
        assert f"make {target}" in README, target
    for target in make_targets():
        assert re.search(rf"^{target}:.*## \S", MAKEFILE, re.MULTILINE), f"{target} has no line in `make`"


@pytest.mark.parametrize(("target", "arguments"), sorted(set(re.findall(r'make ([a-z-]+) ARGS="([^"]+)"', DOCS))))
def test_every_override_of_the_readme_composes(target, arguments):
    command = target if target in cli.COMMANDS else "run"
    overrides = cli._parse([command, *arguments.split()])[1]
    several = sweep_space.is_sweep(overrides)
    assert several == (command == "sweep") or command == "submit"
    (sweep_space.read if several else compose)(overrides)


SECTIONS = "data|model|sampling|evaluate|comparisons|ppo|pretrain|sft|sweep(?!\\.(?:json|csv|journal|md|tex))"


@pytest.mark.parametrize("key", sorted(set(re.findall(rf"`((?:{SECTIONS})\.[a-z_.]+)[=`]", DOCS))))
def test_every_key_of_the_readme_exists(key):
    metrics = [f"{stage}.{name}" for stage in STAGES for name in documented(stage)]
    key = re.sub(r"^evaluate\.(validation\.)?models\.\w+", "evaluate.models.<name>", key)
    key = re.sub(r"^evaluate\.tasks\.\w+\.", "data.text.", key)  # a task is a source of data
    assert key in keys() or any(known.startswith(f"{key}.") for known in keys()) or key in metrics


def test_every_path_of_the_tree_exists():
    tree = README.split("## The tree")[1].split("## Limits")[0]
    folder = Path()
    for line in tree.splitlines():
        columns = re.split(r"\s{3,}", line.strip(), maxsplit=1)[0] if line.startswith("    ") else ""
        names = columns.split()
        if not names:
            continue
        if not line.startswith("      "):
            folder = ROOT / names[0] if names[0].endswith("/") else ROOT
            parent = ROOT
        else:
            parent = folder
        for name in names:
            assert (parent / name).exists(), f"{name} in: {line}"


FOLDERS = ("conf", "pipeline", "stages", "rewards")
TEXTS = [*PAGES, *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.*"))]
NAMED = r"(?<![\w/.])((?:pipeline|stages|rewards|tests|conf|docs)/[\w/.-]+\.(?:py|md|yaml|html))"


def test_every_file_that_texts_name_exists():
    texts = {file: file.read_text() for file in TEXTS if file.suffix in (".md", ".py", ".yaml") and file.stem != "log"}
    missing = [(file.name, name) for file, text in texts.items() for name in re.findall(NAMED, text)]
    assert [(file, name) for file, name in missing if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_exists(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    outside = [link for link in links if re.match(r"\w+:", link)]
    assert outside == [], "links stay within the project, so that they can be checked without a network"
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_into_a_page_names_a_heading_of_it(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        if not re.fullmatch(r"L\d+", anchor):
            headings = re.findall(r"^#+ (.+)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"


GLOSSARY = dict(re.findall(r"^## (.+)\n\n((?:.+\n)+)", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE))
WORDS = (
    "nat, kl, bits per byte, gate, probe, gold judge, proxy, fingerprint, artifact, stale, implicit reward, advantage, "
    "gae, value, rollout, reference, sft, dpo, ppo, best-of-n, elo, wilson interval, distinct-2, self-bleu"
)


def test_the_glossary_is_in_order_and_every_entry_is_short_and_names_a_page():
    assert list(GLOSSARY) == sorted(GLOSSARY, key=str.lower)
    assert set(WORDS.split(", ")) <= {term.lower() for term in GLOSSARY}
    for term, text in GLOSSARY.items():
        assert re.search(r"\(\[[\w ]+\]\(\w+\.md(#[\w-]+)?\)\)\.$", text.strip()), f"{term} names no page"
        assert len(re.findall(r"[.?](?:\s|$)", text)) <= 3, f"{term} is too long"


COMMON = {"seconds", "peak_memory_bytes", "fingerprint", "template_hash", "unusable"}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("ppo", "frontier", "evaluate")])
def test_results_equal_their_documentation(stage, smoke):
    written = set(read_json(smoke / "smoke" / stage / "metrics.json")) - COMMON
    assert written == documented(stage) - {"pairs_from_earlier"}


def test_ppo_results_are_the_last_step_and_the_prompts(smoke):
    written = set(read_json(smoke / "smoke" / "ppo" / "metrics.json")) - COMMON
    assert written == documented("ppo steps") | {"prompts"}


def test_evaluation_results_equal_their_documentation(smoke):
    metrics = read_json(smoke / "smoke" / "evaluate" / "metrics.json")
    values = {f"models.<name>.{key}" for model in metrics.pop("models").values() for key in model}
    assert (values | set(metrics)) - COMMON == documented("evaluate") - {"judge_model", "people", "validation"}


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_logged_steps_equal_their_documentation(stage, smoke):
    written = {key for row in read_lines(smoke / "smoke" / stage / "log.jsonl") for key in row} - {"step"}
    assert written == documented(f"{stage} steps")


def test_names_of_other_libraries_are_given_for_metrics_that_are_logged():
    table = (ROOT / "docs/metrics.md").read_text().split("## Names elsewhere")[1]
    named = re.findall(r"^\| `(\w+)/([^`]+)` \|", table, re.MULTILINE)
    assert len(named) > 20
    assert [(stage, name) for stage, name in named if name not in documented(f"{stage} steps")] == []


DETAIL = r"^\| (\d+) \| .*? \| \[`([\w/.]+)` `(\w+)`\]\(\.\./\2#L(\d+)\) \|"


def line_of(file: str, function: str) -> int:
    """The line on which a file defines a function."""
    lines = (ROOT / file).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(f"def {function}("))


def test_the_details_of_ppo_are_those_of_its_code():
    rows = re.findall(DETAIL, PPO, re.MULTILINE)
    explained, code = (ROOT / "stages/ppo.py").read_text().split('"""', 2)[1:]
    numbers = re.findall(r"^ ?\[(\d+)\] ", explained, re.MULTILINE)
    assert [number for number, *_ in rows] == numbers == [str(i + 1) for i in range(len(rows))]
    code += (ROOT / "pipeline/ppo/advantages.py").read_text()
    for number, file, function, line in rows:
        assert f"[{number}]" in code, f"no line of PPO's code is marked [{number}]"
        assert line_of(file, function) == int(line), "run `python tests/whole/test_readme.py` after moving code"
    for test in set(re.findall(r"tests/\w+\.py", PPO)):
        assert (ROOT / test).is_file()


def site(source: Path, folder: Path) -> subprocess.CompletedProcess:
    """Build the documentation site as `make docs` does."""
    options = ["--quiet", "--fail-on-warning", "--keep-going", "-c", str(ROOT / "docs/site")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("myst_parser"), reason='the site\'s generator is not here: pip install -e ".[docs]"')
def test_the_site_has_every_page_and_no_broken_link(tmp_path):
    done = site(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / page.relative_to(ROOT).with_suffix(".html")).is_file()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Documents\n\n[there](#documents) [not there](nowhere.md)\n")
    done = site(tmp_path, tmp_path / "broken")
    assert done.returncode != 0 and "nowhere" in done.stderr


def test_the_make_default_lists_the_targets():
    assert ".DEFAULT_GOAL := help" in MAKEFILE


def write_lines_of_details() -> None:
    """Bring the line numbers in docs/ppo.md up to date."""
    new = re.sub(
        r"\[`([\w/.]+)` `(\w+)`\]\(\.\./\1#L\d+\)",
        lambda found: f"[`{found[1]}` `{found[2]}`](../{found[1]}#L{line_of(found[1], found[2])})",
        PPO,
    )
    (ROOT / "docs" / "ppo.md").write_text(new)


if __name__ == "__main__":
    write_lines_of_details()
