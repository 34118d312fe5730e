// The report's own script: figures in the colours of the scheme, the current section, printing, and the samples' controls.
"use strict";

const read = id => JSON.parse(document.getElementById(id)?.textContent ?? "null");
const dark = matchMedia("screen and (prefers-color-scheme: dark)"), print = matchMedia("print");

// Figures name the colours of the light scheme.
const figures = read("figure-data"), exchange = new Map(Object.values(read("palette")));

function coloured(value) {
  if (typeof value === "string") return exchange.get(value) ?? value;
  if (Array.isArray(value)) return value.map(coloured);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
}

// plotly.js is in the page compressed. It is unpacked when first needed; its hash lets it run.
let library;

function plotly() {
  return library ??= (async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), letter => letter.charCodeAt(0));
    const script = document.createElement("script");
    script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    document.body.append(script);
  })();
}

async function draw(plots) {
  if (!plots.length) return;
  await plotly();
  for (const plot of plots) {
    const figure = figures[plot.dataset.figure], {data, layout} = dark.matches ? coloured(figure) : structuredClone(figure);
    const family = getComputedStyle(plot).fontFamily, width = print.matches ? 320 : undefined;
    Plotly.react(plot, data, {...layout, width, font: {...layout.font, family}}, {displayModeBar: false, responsive: true});
    plot.dataset.drawn = true;
  }
}

// A figure is drawn when it comes near to what is seen; what is folded has no place on the page until it is opened.
const near = new IntersectionObserver(entries => {
  const plots = entries.filter(entry => entry.isIntersecting).map(entry => entry.target);
  for (const plot of plots) near.unobserve(plot);
  draw(plots);
}, {rootMargin: "500px"});
const plots = [...document.querySelectorAll(".plot")], drawn = () => plots.filter(plot => plot.dataset.drawn);
if (!window.DecompressionStream) for (const plot of plots) plot.textContent = "This browser is too old to draw figures; their numbers are in the folder report.";
else for (const plot of plots) near.observe(plot);
if (plots.length && window.DecompressionStream) (window.requestIdleCallback ?? setTimeout)(plotly);  // printing does not wait

function forPrint() {
  for (const details of document.querySelectorAll("details")) {
    if (print.matches) details.dataset.was = details.open;
    details.open = print.matches || details.dataset.was === "true";
  }
  draw(print.matches && window.DecompressionStream ? plots : drawn());
}

dark.addEventListener("change", () => draw(drawn()));
print.addEventListener("change", forPrint);

// The link of the section that is being read.
const links = new Map([...document.querySelectorAll("nav a:not(.home)")].map(a => [a.hash.slice(1), a]));
const reading = new IntersectionObserver(entries => {
  for (const entry of entries.filter(entry => entry.isIntersecting)) {
    for (const link of links.values()) link.removeAttribute("aria-current");
    const link = links.get(entry.target.id), nav = link.parentElement;
    link.setAttribute("aria-current", "true");
    nav.scrollLeft = link.offsetLeft - nav.clientWidth / 2 + link.offsetWidth / 2;
  }
}, {rootMargin: "-20% 0px -70% 0px"});
for (const section of document.querySelectorAll("main > section")) reading.observe(section);

// Samples: what is typed and chosen decides which prompts and replies are shown, and in which order.
const controls = document.querySelector(".controls"), more = document.querySelector(".more"), scores = read("scores");
const FIRST = 1;  // prompts that are shown until more are asked for

function percentiles() {
  const sorted = {};
  for (const row of scores) for (const reply of Object.values(row)) for (const [judge, score] of Object.entries(reply)) {
    if (score !== null) (sorted[judge] ??= []).push(score);
  }
  for (const column of Object.values(sorted)) column.sort((a, b) => a - b);
  return (judge, score) => {
    const below = sorted[judge].findIndex(other => other >= score), upTo = sorted[judge].findLastIndex(other => other <= score);
    return (below + upTo) / 2 / Math.max(1, sorted[judge].length - 1);
  };
}

function sample() {
  const place = percentiles(), cards = [...document.querySelectorAll(".sample")];
  const known = values => values.filter(value => value !== null && value !== undefined);
  const keys = {
    given: number => -number,
    highest: (number, judge, models) => Math.max(...known(models.map(m => scores[number][m]?.[judge]))),
    lowest: (number, judge, models) => -Math.min(...known(models.map(m => scores[number][m]?.[judge]))),
    changed: (number, judge, models) => {
      const before = scores[number].sft?.[judge], after = known(models.map(m => scores[number][m]?.[judge]));
      return known([before]).length ? Math.max(...after.map(score => Math.abs(score - before))) : -Infinity;
    },
    disagreement: (number, judge, models) => Math.max(...models.map(m => {
      const said = Object.entries(scores[number][m] ?? {}).filter(([, score]) => score !== null).map(([j, score]) => place(j, score));
      return Math.max(...said) - Math.min(...said);
    })),
  };

  let all = cards.length <= FIRST;

  function update() {
    const chosen = new FormData(controls), models = chosen.getAll("model"), judge = chosen.get("judge");
    const words = chosen.get("text").toLowerCase().split(/\s+/).filter(Boolean);
    const [low, high] = [["low", -Infinity], ["high", Infinity]].map(([name, none]) => chosen.get(name) === "" ? none : Number(chosen.get(name)));
    const limited = low > -Infinity || high < Infinity;
    let shown = 0;
    for (const card of cards) {
      const number = Number(card.dataset.number), texts = [...card.querySelectorAll(".prompt q")].map(q => q.textContent);
      for (const reply of card.querySelectorAll(".reply")) {
        reply.hidden = !models.includes(reply.dataset.model);
        if (!reply.hidden) texts.push(reply.querySelector("p").textContent);
      }
      const text = texts.join("\n").toLowerCase(), inside = known(models.map(m => scores[number][m]?.[judge])).some(s => s >= low && s <= high);
      card.hidden = !words.every(word => text.includes(word)) || (limited && !inside);
      shown += !card.hidden;
    }
    const key = card => keys[chosen.get("order")](Number(card.dataset.number), judge, models), by = new Map(cards.map(card => [card, key(card)]));
    const sorted = [...cards].sort((a, b) => by.get(b) - by.get(a) || a.dataset.number - b.dataset.number);
    document.querySelector(".samples").append(...sorted);
    const late = all ? [] : sorted.filter(card => !card.hidden).slice(FIRST);
    for (const card of cards) card.classList.toggle("late", late.includes(card));
    more.hidden = !late.length;
    more.textContent = `Show ${late.length} more`;
    controls.querySelector("output").value = `${shown} of ${cards.length} prompts`;
    mark(words);
  }

  function mark(words) {
    if (!CSS.highlights) return;
    const ranges = [];
    for (const text of document.querySelectorAll(".sample:not([hidden], .late) :is(.prompt q, .reply p)")) for (const node of text.childNodes) {
      if (node.nodeType !== Node.TEXT_NODE) continue;
      for (const word of words) for (let at = -1; (at = node.data.toLowerCase().indexOf(word, at + 1)) >= 0;) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, Math.min(at + word.length, node.length));
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  controls.hidden = false;
  more.addEventListener("click", () => { all = true; update(); });
  controls.addEventListener("input", update);
  controls.addEventListener("submit", event => event.preventDefault());
  controls.addEventListener("reset", () => setTimeout(update));
  update();
}

if (controls) sample();
