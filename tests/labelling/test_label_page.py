"""The labelling page in a browser: keys, undo, reload, a killed server, two widths, and what a screen reader meets."""

import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from browsers import CHROMIUM, CONTRASTS, DESKTOP, PHONE, playwright
from pools import write_pool

from threefold.fileio import read_lines

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ROOT = Path(__file__).parents[2]
KEYS = {"ArrowLeft": 0, "1": 0, "ArrowRight": 1, "2": 1, "t": None}  # key → which reply it chooses


class Server:
    """`threefold label` in a process of its own, on one port through restarts."""

    def __init__(self, folder: Path, count: int = 24):
        self.votes, self.pool, self.port = folder / "votes.jsonl", folder / "pool.jsonl", 0
        write_pool(self.pool, [pair(i) for i in range(count)])

    def start(self) -> None:
        arguments = [f"label.pairs={self.pool}", f"label.votes={self.votes}", f"label.port={self.port}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "threefold", "label", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/", line := self.process.stdout.readline())):
            assert line, "the server ended"
        self.port, self.address = int(found[1]), found[0]

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=30)
        return self.process.returncode


def pair(number: int) -> dict:
    talk = [("user", f"Question {number}: do you like rain?"), ("assistant", "I do."), ("user", "And  then?\n\n  Why?")]
    return {
        "pair": f"pair-{number}",
        "prompt": [{"role": role, "content": text} for role, text in talk],
        "response_a": f"first model on {number}: <b>yes</b>\n  & more",
        "response_b": f"second model on {number}: " + "no, I would rather stay inside. " * (1 + number % 3),
        "model_a": "sft",
        "model_b": "ppo",
        "split": "train",
    }


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    if server.process.poll() is None:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for the tests that leave it as it is; each comes under a name of its own."""
    server = Server(tmp_path_factory.mktemp("shared"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def visit(browser):
    """Opens pages that note requests and console messages; at the end there was nothing that should not be."""
    contexts, requested, messages = [], [], []

    def open_page(address: str, **options):
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(address)
        return page

    open_page.messages = messages
    yield open_page
    for context in contexts:
        context.close()
    assert requested and all(re.match(r"http://127\.0\.0\.1:\d+/|data:image/svg", url) for url in requested)
    assert messages == []


def count(page) -> int:
    return int(page.locator(".count b").inner_text())


def replies(page) -> list[str]:
    return page.locator(".reply .words").all_text_contents()


def until(page, labelled: int) -> None:
    """Wait until the page says how many pairs are labelled."""
    playwright.expect(page.locator(".count b")).to_have_text(str(labelled))


def press(page, key: str) -> str | None:
    """Vote with a key; returns the text of the chosen reply, None for a tie."""
    before, shown = count(page), replies(page)
    page.keyboard.press(key)
    until(page, before + 1)
    return None if KEYS[key] is None else shown[KEYS[key]]


def votes_of(server: Server, labeller: str) -> list[dict]:
    return [line for line in read_lines(server.votes) if line["labeller"] == labeller]


def winners(votes: list[dict]) -> list[str | None]:
    """The text of the chosen reply of each vote, None for a tie."""
    return [line.get(f"response_{line['winner'][-1]}") for line in votes]


def test_labels_survive_undo_reload_and_a_killed_server(server, visit):
    page = visit(server.address)
    page.keyboard.type("Anna Ö.")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Which reply is better?")
    generator, chosen = random.Random(1), []
    for _ in range(20):
        chosen.append(press(page, generator.choice(list(KEYS))))
    assert winners(read_lines(server.votes)) == chosen

    page.keyboard.press("u")
    until(page, 19)
    chosen.pop()
    assert winners(read_lines(server.votes)) == chosen
    page.reload()
    assert count(page) == 19
    chosen.append(press(page, "2"))

    server.stop(signal.SIGKILL)
    shown = replies(page)
    page.keyboard.press("1")
    page.wait_for_selector(".notice.failed >> text=nothing was recorded")
    assert replies(page) == shown and "ERR_CONNECTION_REFUSED" in visit.messages.pop()
    with server.votes.open("ab") as torn:
        torn.write(b'{"pair": "pair-3", "prompt": [{"ro')
    server.start()
    chosen.append(press(page, "1"))  # the page that was open goes on
    page.reload()
    while count(page) < 24:
        chosen.append(press(page, generator.choice(list(KEYS))))
    assert winners(read_lines(server.votes)) == chosen
    lines = read_lines(server.votes)
    assert {line["labeller"] for line in lines} == {"Anna Ö."} and len({line["pair"] for line in lines}) == 24
    rows = {line["pair"]: line for line in read_lines(server.pool)}
    assert all(line[key] == value for line in lines for key, value in rows[line["pair"]].items())
    assert "All pairs are labelled" in page.inner_text("h1") and "make reward" in page.inner_text("pre")
    assert server.stop() == 0


def test_the_models_are_not_told_apart_by_their_side(shared, visit):
    page = visit(f"{shared.address}?labeller=carl")
    for _ in range(24):
        press(page, "1")
    sides = [line["winner"] for line in votes_of(shared, "carl")]
    assert 4 < sides.count("model_a") < 20
    assert "sft" not in page.content() and "ppo" not in page.content()


def test_text_is_shown_as_it_was_written(shared, visit):
    page = visit(f"{shared.address}?labeller=dora")
    for text in replies(page):
        number = int(re.search(r"on (\d+):", text)[1])
        assert text in (pair(number)["response_a"], pair(number)["response_b"])
    assert page.locator(".prompt .words").last.text_content() == "And  then?\n\n  Why?"
    assert page.locator(".prompt .words").last.evaluate("e => getComputedStyle(e).whiteSpace") == "pre-wrap"
    assert page.locator(".role").all_text_contents() == ["User", "Assistant", "User"]


def test_keys_rest_while_a_reason_is_written(shared, visit):
    page = visit(f"{shared.address}?labeller=emil")
    page.keyboard.press("r")
    page.keyboard.type("12 tests, s u t")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert count(page) == 0
    page.keyboard.press("Escape")
    press(page, "t")
    assert votes_of(shared, "emil")[0]["reason"] == "12 tests, s u \nt"
    for combined in ("Control+1", "Shift+ArrowLeft", "Alt+t"):
        page.keyboard.press(combined)
    page.evaluate("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 't', repeat: true, bubbles: true}))")
    page.wait_for_timeout(300)
    assert count(page) == 1
    page.keyboard.press("u")
    until(page, 0)
    assert page.input_value("#reason") == "12 tests, s u \nt"


def test_keys_can_be_turned_off(shared, visit):
    page = visit(f"{shared.address}?labeller=fred")
    page.click("summary")
    page.uncheck("#keys")
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    page.reload()
    page.keyboard.press("1")
    page.wait_for_timeout(300)
    assert count(page) == 0 and not page.locator("kbd").first.is_visible()
    page.click("summary")
    page.check("#keys")
    page.keyboard.press("Escape")
    press(page, "1")


def test_the_page_works_without_its_script(shared, visit):
    page = visit(shared.address, java_script_enabled=False)
    page.fill("#labeller", "greta")
    page.click("text=Start")
    shown = replies(page)
    page.get_by_role("button", name="Reply 2 is better").click()
    assert winners(votes_of(shared, "greta")) == [shown[1]] and count(page) == 1
    page.get_by_role("button", name="Skip").click()
    assert "1 skipped" in page.inner_text(".count")
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Undo").click()
    assert count(page) == 0 and not page.locator("kbd").first.is_visible()


def test_skipped_pairs_come_back_at_the_end(tmp_path, visit):
    server = Server(tmp_path, count=3)
    server.start()
    page = visit(f"{server.address}?labeller=ben")
    skipped = replies(page)
    page.keyboard.press("s")
    page.wait_for_selector("text=1 skipped")
    press(page, "1")
    press(page, "1")
    assert page.inner_text("h1") == "Only skipped pairs are left"
    page.click("text=Look at the skipped pair again")
    page.wait_for_selector("text=Which reply is better?")
    assert replies(page) == skipped
    press(page, "t")
    assert page.inner_text("h1") == "All pairs are labelled"
    server.stop()


def test_two_labellers_share_the_order_and_see_their_agreement(server, visit):
    pages = [visit(f"{server.address}?labeller={name}") for name in ("anna", "ben")]
    asked = [[], []]
    for _ in range(5):
        for page, seen in zip(pages, asked, strict=True):
            seen.append(page.inner_text(".prompt"))
            press(page, "t")
    assert asked[0] == asked[1]
    pages[1].click("summary")
    said = pages[1].inner_text(".panel")
    assert "anna and ben agree on 100% of 5 shared pairs; Cohen’s kappa is not defined." in said
    assert "Fewer than 30" in said


# width, colours, and access


@pytest.mark.parametrize("size", [DESKTOP, PHONE, {"width": 320, "height": 568}], ids=["desktop", "phone", "small"])
def test_nothing_runs_out_of_the_window_and_buttons_stay_in_reach(size, tmp_path, visit):
    server = Server(tmp_path, count=1)
    wide = pair(0) | {"response_a": "x" * 4000, "response_b": "word " * 3000}
    wide["prompt"] = [{"role": "user", "content": f"{'y' * 900} " * 9}, {"role": "user", "content": "the last words"}]
    write_pool(server.pool, [wide])
    server.start()
    page = visit(f"{server.address}?labeller=a-name-without-any-space-in-it-{'n' * 9}", viewport=size)
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        page.keyboard.press("Escape")
        if page.locator(".reply").count():
            for button in page.locator(".bar button").all():
                box = button.bounding_box()
                assert box["y"] + box["height"] <= size["height"] and box["height"] >= 44 and box["width"] >= 44
            assert page.locator("text=the last words").is_visible()
            inside = "e => { const p = e.closest('.prompt').getBoundingClientRect(), b = e.getBoundingClientRect();"
            assert page.locator("text=the last words").evaluate(inside + "return b.bottom <= p.bottom + 1 }")
            press(page, "1")
    page.goto(server.address)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    server.stop()


def test_replies_are_stacked_on_a_phone_and_side_by_side_on_a_desk(shared, visit):
    for size, stacked in ((PHONE, True), (DESKTOP, False)):
        page = visit(f"{shared.address}?labeller=hans", viewport=size)
        first, second = (reply.bounding_box() for reply in page.locator(".reply").all())
        assert (second["y"] >= first["y"] + first["height"]) == stacked
        assert abs(first["width"] - second["width"]) < 1


# luminance contrast of each text with what lies behind it, as WCAG 2 defines it
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(scheme, shared, visit):
    page = visit(shared.address, color_scheme=scheme)
    found = page.evaluate(CONTRASTS)
    page.goto(f"{shared.address}?labeller={scheme}")
    press(page, "1")
    page.click("summary")
    found += page.evaluate(CONTRASTS)
    page.evaluate("document.querySelector('.notice').classList.add('failed')")
    found += page.evaluate(CONTRASTS)
    assert len(found) > 50
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []


def test_every_control_has_a_name_and_shows_its_focus(shared, visit):
    page = visit(f"{shared.address}?labeller=ida")
    press(page, "1")
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e);"
            "return [e.tagName, e.getAttribute('aria-label') || (e.labels && e.labels[0] || e).innerText,"
            "s.outlineStyle, parseFloat(s.outlineWidth)] }"
        )
        if focused[0] == "BODY":
            break
        assert focused[2] == "solid" and focused[3] >= 2, focused
        names.append(" ".join(focused[1].split()))
    assert names == ["Reason (optional) R", "Reply 1 is better", "Tie T", "Reply 2 is better", "Undo U", "Skip S"]
    tree = page.locator("body").aria_snapshot()
    for line in ('button "Tie"', 'button "Undo"', 'button "Skip"', 'textbox "Reason (optional)"', "- banner", "- main",
                 'heading "Which reply is better?" [level=1]', 'region "Reply 1"', 'progressbar "Pairs labelled"',
                 'region "What was said to the model"'):  # fmt: skip
        assert line in tree, f"{line} in:\n{tree}"


def test_all_can_be_done_with_tab_and_enter(shared, visit):
    page = visit(shared.address)
    page.keyboard.type("jo")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Which reply is better?")
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.value") == "tie":
            break
    page.keyboard.press("Enter")
    until(page, 1)
    assert votes_of(shared, "jo")[0]["winner"] == "tie"
    page.goto(shared.address)
    page.click("text=jo")
    assert count(page) == 1


def test_what_was_recorded_is_announced_and_focus_goes_to_the_heading(shared, visit):
    page = visit(f"{shared.address}?labeller=karin")
    said = page.locator("#said")
    assert said.get_attribute("aria-live") == "polite" and said.get_attribute("role") == "status"
    for number in (2, 3):
        press(page, "ArrowLeft")
        playwright.expect(said).to_have_text(f"Recorded: reply 1 is better. Pair {number} of 24.")
        assert page.evaluate("document.activeElement.tagName") == "H1" and page.title().startswith(f"Pair {number} of")


def test_nothing_moves_for_those_who_asked_for_that(shared, visit):
    page = visit(f"{shared.address}?labeller=lars", reduced_motion="reduce")
    durations = "() => [...document.querySelectorAll('*')].map(e => getComputedStyle(e).transitionDuration)"
    assert set(page.evaluate(durations)) == {"0s"}
