// The page's frame: addresses, requests, what is marked, keys.
import { views, showReference } from "/views.js";

export const state = { about: {}, layer: "mask", marked: new Map(), timer: 0 };
const $ = (id) => document.getElementById(id);

/** An element with properties and children; `style` is an object, `data-` and `aria-` are attributes. */
export function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key === "style") Object.assign(made.style, value);
    else if (key.includes("-") || key === "role" || key === "for") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** The JSON at an address. What the server refuses is thrown with its reason. */
export async function ask(path, options) {
  const answer = await fetch(path, options);
  const isJson = (answer.headers.get("content-type") || "").includes("json");
  const content = isJson ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(content.error || answer.statusText);
  return content;
}

export function note(text) {
  $("note").textContent = text;
  $("note").classList.add("shown");
  clearTimeout(note.timer);
  note.timer = setTimeout(() => $("note").classList.remove("shown"), 3500);
}

export function address() {
  const [view = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  return { view: view || "nouns", rest };
}

/** Marks a reference as bad, or takes the mark back. */
export function mark(id, tile) {
  if (state.marked.has(id)) state.marked.delete(id);
  else state.marked.set(id, tile);
  tile?.setAttribute("aria-selected", state.marked.has(id));
  showMarks();
}

function showMarks() {
  $("marks").hidden = !state.marked.size;
  $("marked").textContent = `${state.marked.size} marked`;
}

export function clearMarks() {
  for (const tile of state.marked.values()) tile?.setAttribute("aria-selected", false);
  state.marked.clear();
  showMarks();
}

export async function change(ids, body, said) {
  await ask("/api/tombstones", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ids, fingerprint: state.about.fingerprint, ...body }),
  });
  note(said);
  await about();
  await show(true);
}

async function about() {
  state.about = await ask("/api/about");
  $("place").textContent = state.about.url.split("/").slice(-2).join("/");
  $("place").title = state.about.url;
  document.title = `${state.about.url.replace(/\/+$/, "").split("/").pop()} · ovref`;
  for (const link of document.querySelectorAll("nav a")) {
    const page = link.hash.slice(2);
    link.hidden = page === "build" ? !state.about.build : !state.about.collection;
  }
}

async function show(again = false) {
  clearInterval(state.timer);
  const { view, rest } = address();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (!again && $("sheet").open) $("sheet").close();
  const name = state.about.collection || view === "build" ? view : "build";
  try {
    await (views[name] || views.nouns)($("main"), rest);
  } catch (error) {
    $("main").replaceChildren(el("p", { className: "error" }, error.message));
  }
}

$("marks").addEventListener("submit", async (event) => {
  event.preventDefault();
  const ids = [...state.marked.keys()];
  try {
    const said = `${ids.length} deleted; the page “Deleted” takes it back`;
    clearMarks();
    await change(ids, { reason: $("reason").value }, said);
  } catch (error) {
    note(error.message);
  }
});
$("unmark").addEventListener("click", clearMarks);

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("theme", name);
}
const dark = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = localStorage.getItem("theme") || (dark.matches ? "dark" : "light");
dark.addEventListener("change", () => {
  if (!localStorage.getItem("theme")) document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
});
$("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

const KEYS = [
  ["/", "search the vocabulary"], ["← → ↑ ↓", "move between pictures"], ["Enter", "open a reference"],
  ["x", "mark as bad"], ["1 2 3 4", "image, mask, heatmap, crop"], ["n p", "next and previous noun"],
  ["g n, g c, g s, g f, g d, g b", "nouns, coverage, segment, filtered, deleted, build"], ["t", "light or dark"],
  ["Esc", "close, or clear marks"],
];
function help() {
  const keys = KEYS.flatMap(([key, what]) => [el("span", {}, el("kbd", {}, key)), el("span", {}, what)]);
  const close = el("button", { className: "close", onclick: () => $("sheet").close() }, "Close");
  $("sheet").replaceChildren(close, el("h1", {}, "Keys"), el("p"), el("div", { className: "keys" }, keys));
  $("sheet").showModal();
}
$("help").addEventListener("click", help);

let before = "";
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const last = before;
  before = event.key;
  const pages = { n: "nouns", c: "coverage", s: "segment", f: "filtered", d: "deleted", b: "build" };
  if (last === "g" && pages[event.key]) {
    location.hash = `#/${pages[event.key]}`;
  } else if (event.key === "/") {
    document.querySelector("input[type=search]")?.focus();
  } else if (event.key === "?") {
    help();
  } else if (event.key === "t") {
    $("theme").click();
  } else if (event.key === "x") {
    const tile = document.activeElement.closest(".tile[data-id]");
    if (tile) mark(Number(tile.dataset.id), tile);
  } else if (event.key === "Escape" && !$("sheet").open) {
    clearMarks();
  } else if ("1234".includes(event.key)) {
    document.querySelectorAll(".layers button")[Number(event.key) - 1]?.click();
  } else if (event.key === "n" || event.key === "p") {
    const words = [...document.querySelectorAll(".list a")];
    const at = words.findIndex((word) => word.hasAttribute("aria-current"));
    words[Math.max(0, at + (event.key === "n" ? 1 : -1))]?.click();
  } else if (event.key.startsWith("Arrow")) {
    move(event);
    return;
  } else {
    return;
  }
  event.preventDefault();
});

function move(event) {
  const scope = $("sheet").open ? $("sheet") : $("main");
  const tiles = [...scope.querySelectorAll(".tile[tabindex]")];
  const at = tiles.indexOf(document.activeElement.closest(".tile"));
  if (!tiles.length || (at < 0 && $("sheet").open)) return;
  const top = tiles[Math.max(at, 0)].offsetTop;
  const columns = Math.max(1, tiles.filter((tile) => tile.offsetTop === top).length);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  tiles[at < 0 ? 0 : Math.min(tiles.length - 1, Math.max(0, at + steps[event.key]))].focus();
  event.preventDefault();
}

window.addEventListener("hashchange", () => show());
export { showReference, show };
// The token in the address has become a cookie; it shall not stay in the history.
if (location.search) history.replaceState(null, "", location.pathname + location.hash);
about().then(() => show()).catch((error) =>
  $("main").replaceChildren(el("p", { className: "error" }, error.message)));
