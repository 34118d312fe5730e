// Keys for the buttons, and forms sent without loading a new page, so that a screen reader hears what was recorded.
// Without this script every form and button works, each with a page of its own.
"use strict";

const page = document.getElementById("page");
const root = document.documentElement;
let sending = false;

/** Words for a screen reader, in a region that outlives the pages; emptied first, so that the same are read again. */
function say(text) {
  const said = document.getElementById("said");
  said.textContent = "";
  setTimeout(() => { said.textContent = text; }, 50);
}

function keysAreOn() {
  return localStorage.getItem("keys") !== "off";
}

/** What a page needs after it came, from the server or in the place of another. */
function prepare() {
  root.classList.toggle("keys", keysAreOn());
  const box = document.getElementById("keys");
  if (box) box.checked = keysAreOn();
  const prompt = page.querySelector(".prompt");
  if (prompt && prompt.scrollHeight > prompt.clientHeight) {
    prompt.tabIndex = 0; // scrolls with the arrow keys
    prompt.scrollTop = prompt.scrollHeight; // the last turn is what the replies answer
  }
}

/** Show a page that the server sent, announce it, and start reading at its heading. */
function show(html) {
  const next = new DOMParser().parseFromString(html, "text/html");
  document.title = next.title;
  page.replaceChildren(...next.getElementById("page").childNodes);
  prepare();
  window.scrollTo(0, 0);
  page.querySelector("h1").focus({ preventScroll: true });
  const notice = page.querySelector(".notice").textContent;
  say(`${notice} ${next.title.split(" · ")[0]}.`);
}

function fail(text) {
  const notice = page.querySelector(".notice");
  notice.textContent = text;
  notice.classList.add("failed");
  say(text);
}

async function send(form, button) {
  const body = new URLSearchParams(new FormData(form, button));
  let response;
  try {
    response = await fetch(form.action, { method: "POST", body });
    const text = await response.text();
    response.ok ? show(text) : fail(text);
  } catch {
    fail("The server does not answer, so nothing was recorded. Start it again, then press once more.");
  }
}

document.addEventListener("submit", async (event) => {
  if (event.target.method !== "post") return;
  event.preventDefault();
  if (sending) return; // a second press while the first is on its way
  sending = true;
  await send(event.target, event.submitter);
  sending = false;
});

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  const writing = target.matches("textarea, input, select");
  if (key === "Escape") {
    const menu = page.querySelector(".menu[open]");
    menu?.removeAttribute("open");
    if (menu) menu.querySelector("summary").focus();
    else if (writing) page.querySelector("h1").focus({ preventScroll: true });
    return;
  }
  const combined = event.ctrlKey || event.metaKey || event.altKey || event.shiftKey;
  if (writing || combined || event.repeat || event.isComposing || !keysAreOn()) return;
  const name = key.length === 1 ? key.toLowerCase() : key;
  const control = name === "r" ? document.getElementById("reason")
    : page.querySelector(`button[aria-keyshortcuts~="${CSS.escape(name)}"]`);
  if (!control) return;
  event.preventDefault();
  name === "r" ? control.focus() : control.click();
});

document.addEventListener("change", (event) => {
  if (event.target.id !== "keys") return;
  localStorage.setItem("keys", event.target.checked ? "on" : "off");
  prepare();
});

document.addEventListener("click", (event) => {
  if (!event.target.closest(".menu")) page.querySelector(".menu")?.removeAttribute("open");
});

root.classList.add("script");
prepare();
