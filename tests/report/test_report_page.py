"""The report in a browser: widths, schemes, print, no request and no error, samples that are searched and sorted."""

import json

import pytest
from browsers import CHROMIUM, CONTRASTS, DESKTOP, PHONE, playwright
from reports import change_samples, copy_of, write

from threefold.display.figures import PALETTE
from threefold.fileio import read_lines

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

EVIL = '</script><script>document.title = "evil"</script><img src="http://127.0.0.1:9/x" onerror="document.title = 1">'


@pytest.fixture(scope="module")
def runs(smoke, tmp_path_factory):
    """A run whose replies are markup here and there, with a report that compares it with itself under another name."""
    runs = copy_of(smoke, tmp_path_factory.mktemp("page") / "runs")

    def spoil(row):
        row["ppo"]["reply"] += EVIL
        row["prompt"][-1]["content"] += EVIL

    change_samples(runs, spoil)
    (runs / "smoke").rename(runs / "other")
    copy_of(smoke, runs.parent / "again")
    (runs.parent / "again/smoke").rename(runs / "smoke")
    for artifact in (runs.parent / "again/artifacts").iterdir():
        if not (runs / "artifacts" / artifact.name).exists():
            artifact.rename(runs / "artifacts" / artifact.name)
    write(runs, compare="other")
    return runs


@pytest.fixture(scope="module")
def visit(browser, runs):
    """Opens the page in a context of its own, noting requests and what is said on the console."""
    contexts, address = [], (runs / "smoke/report.html").as_uri()

    def open_page(**options):
        contexts.append(browser.new_context(**{"viewport": DESKTOP, **options}))
        page = contexts[-1].new_page()
        page.on("request", lambda request: open_page.requested.add(request.url))
        page.on("console", lambda message: open_page.messages.append(message.text))
        page.on("pageerror", lambda error: open_page.messages.append(str(error)))
        page.goto(address)
        return page

    open_page.requested, open_page.messages, open_page.address = set(), [], address
    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(autouse=True)
def quiet(visit):
    """Whatever a test did, nothing was asked for but the page, and nothing was said on the console."""
    yield
    assert visit.requested - {"data:,"} == {visit.address} and visit.messages == []


@pytest.fixture(scope="module")
def opened(visit):
    page = visit(color_scheme="light")
    page.locator(".more").click()  # all samples
    return page


@pytest.fixture
def page(opened):
    """The page on a desktop, as it is when it was opened."""
    opened.emulate_media(media="screen", color_scheme="light")
    opened.set_viewport_size(DESKTOP)
    opened.click("[type=reset]")
    playwright.expect(opened.locator(".controls output")).to_have_text("4 of 4 prompts")
    return opened


def draw_all(page) -> None:
    """Look at every figure of the page, which draws it."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        playwright.expect(plot.locator("svg.main-svg").first).to_be_attached()
    assert page.locator(".plot[data-drawn]").count() == page.locator(".plot").count() > 15


def stroke(page, colour: str) -> None:
    """Wait until PPO's curves have a colour."""
    line = page.locator('[data-figure="ppo_kl"] .scatterlayer path.js-line').first
    playwright.expect(line).to_have_css("stroke", rgb_of(colour))


def rgb_of(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_fits_its_width_and_can_be_read_in_both_schemes(size, visit, page):
    if size == PHONE:
        page = visit(viewport=PHONE, color_scheme="light", has_touch=True, is_mobile=True)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    draw_all(page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        stroke(page, PALETTE["ppo"][scheme == "dark"])
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        found = [(round(ratio, 2), text) for ratio, text in page.evaluate(CONTRASTS) if "share" not in text]
        assert len(found) > 300 and [text for ratio, text in found if ratio < 4.5] == []
    for box in page.locator(".scroll").all():  # a wide table scrolls by itself
        assert box.evaluate("e => e.offsetWidth <= document.documentElement.clientWidth - e.offsetLeft")
    visible = page.locator(".lineage.wide").is_visible(), page.locator(".lineage.narrow").is_visible()
    assert visible == ((True, False) if size == DESKTOP else (False, True))
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")


def test_the_page_is_short_draws_what_is_near_and_shows_more_samples_when_asked(visit):
    page = visit(viewport=PHONE, color_scheme="light")
    high = page.evaluate("document.documentElement.scrollHeight - document.getElementById('compare').offsetHeight")
    assert high < 11_500  # it was 28,600
    assert page.locator(".sample:visible").count() == 1 and page.locator(".more").inner_text() == "Show 3 more"
    page.wait_for_function("window.Plotly")
    assert page.locator(".plot[data-drawn]").count() < 4  # none is near the top
    page.locator('[data-figure="ppo_kl"]').scroll_into_view_if_needed()
    playwright.expect(page.locator('[data-figure="ppo_kl"] svg.main-svg').first).to_be_visible()
    assert page.locator("details:not([open]) .plot[data-drawn]").count() == 0
    page.locator(".more").click()
    assert page.locator(".sample:visible").count() == 4 and page.locator(".more").is_hidden()


def test_print_is_light_open_and_without_controls(page):
    page.emulate_media(media="print", color_scheme="dark")
    stroke(page, PALETTE["ppo"][0])
    assert not page.locator("nav").is_visible() and not page.locator(".controls").is_visible()
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    page.set_viewport_size({"width": 688, "height": 900})  # A4 within its margins
    assert page.evaluate("document.documentElement.scrollWidth") == 688
    page.emulate_media(media="screen", color_scheme="dark")
    stroke(page, PALETTE["ppo"][1])
    assert not page.evaluate("[...document.querySelectorAll('details')].some(d => d.open)")


def test_the_links_lead_to_sections_and_follow_reading(page):
    for link in page.locator("nav a:not(.home)").all():
        assert page.locator(link.get_attribute("href")).count() == 1
    page.locator("#arena").evaluate("e => scrollTo({top: e.offsetTop, behavior: 'instant'})")
    page.wait_for_selector('nav a[href="#arena"][aria-current]')


def test_a_page_without_its_script_still_has_every_word(visit):
    page = visit(java_script_enabled=False)
    assert page.locator(".sample").count() == 4 and page.locator(".controls").is_hidden()
    assert page.locator("#summary li").count() > 5 and "numbers are in the folder report" in page.inner_text("noscript")


def test_a_browser_that_cannot_unpack_plotly_says_so(visit, browser):
    page = browser.new_context(viewport=DESKTOP).new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(visit.address)
    assert page.locator('[data-figure="ppo_kl"]').inner_text().startswith("This browser is too old to draw figures")
    assert page.locator(".sample:visible").count() == 1


# Samples


@pytest.fixture
def rows(runs):
    return read_lines(runs / "smoke/evaluate/samples.jsonl")[:4]


def shown(page) -> list[int]:
    """The numbers of the prompts that can be seen, in their order."""
    return [int(c.get_attribute("data-number")) for c in page.locator(".sample").all() if c.is_visible()]


def test_search_finds_words_in_prompts_and_replies_of_the_models_chosen(page, rows):
    word = max(rows[2]["dpo"]["reply"].split(), key=len)
    page.fill("[name=text]", word.upper())
    found = [i for i, row in enumerate(rows) if word.lower() in json.dumps(row, ensure_ascii=False).lower()]
    assert 2 in found and set(shown(page)) == set(found)
    assert page.inner_text(".controls output") == f"{len(found)} of 4 prompts"
    page.uncheck("[value=dpo]")
    assert page.locator(".sample .reply[data-model=dpo]").first.is_hidden()
    without = [i for i in found if word.lower() in json.dumps(rows[i] | {"dpo": ""}, ensure_ascii=False).lower()]
    assert shown(page) == without
    page.fill("[name=text]", "no such words anywhere")
    assert shown(page) == [] and page.inner_text(".controls output") == "0 of 4 prompts"
    page.click("[type=reset]")
    playwright.expect(page.locator(".controls output")).to_have_text("4 of 4 prompts")
    assert shown(page) == [0, 1, 2, 3]


def test_replies_are_sorted_and_limited_by_score(page, rows):
    models, judge = ("human", "base", "sft", "dpo", "ppo"), "second"
    page.select_option("[name=judge]", judge)
    scores = [[row[m][judge] for m in models] for row in rows]
    changed = [max(abs(score - row["sft"][judge]) for score in found) for row, found in zip(rows, scores, strict=True)]
    for order, key in {"highest": [-max(s) for s in scores], "lowest": [min(s) for s in scores],
                       "changed": [-c for c in changed], "given": [0] * 4}.items():  # fmt: skip
        page.select_option("[name=order]", order)
        assert shown(page) == sorted(range(4), key=lambda i: (key[i], i)), order
    limit = sorted(max(s) for s in scores)[-2]
    page.fill("[name=low]", str(limit))
    assert shown(page) == [i for i in range(4) if max(scores[i]) >= limit]
    page.fill("[name=high]", str(limit - 1))
    assert shown(page) == []


def test_disagreement_compares_ranks_of_judges(page, rows):
    page.select_option("[name=order]", "disagreement")
    judges = ("gold", "second", "reward_model")
    columns = {j: sorted(r[m][j] for r in rows for m in r if m != "prompt" and j in r[m]) for j in judges}

    def rank(judge, score):
        column = columns[judge]
        last = len(column) - 1 - column[::-1].index(score)
        return (column.index(score) + last) / 2 / (len(column) - 1)

    def spread(row):
        ranks = [[rank(j, row[m][j]) for j in judges if j in row[m]] for m in row if m != "prompt"]
        return max(max(r) - min(r) for r in ranks)

    assert shown(page) == sorted(range(4), key=lambda i: (-spread(rows[i]), i))


def test_markup_in_replies_is_text(page, rows):
    assert page.title() == "smoke · Threefold" and page.locator("img").count() == 0
    assert page.locator(".reply[data-model=ppo] p").first.inner_text().endswith(EVIL)
    assert page.locator("script").count() == page.content().count("<script")
