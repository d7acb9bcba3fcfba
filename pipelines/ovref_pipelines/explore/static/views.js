// The pages: nouns with their galleries, coverage, segmenting, deleted references, the build.
import { ask, change, clearMarks, el, mark, note, state } from "/app.js";

const PAGE = 24;
const sheet = document.getElementById("sheet");
const kept = { search: "", order: "count", gallery: "suspicious", classes: "" };

export const views = { nouns, coverage, segment, filtered, deleted, build };

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
const number = (count) => count.toLocaleString("en");
const nounLink = (noun) => `#/nouns/${encodeURIComponent(noun)}`;

function time(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

function captionOf(caption, spans) {
  const letters = [...caption]; // spans count characters, strings of JavaScript UTF-16 units
  const text = { slice: (from, to) => letters.slice(from, to).join("") };
  const parts = [];
  let at = 0;
  for (const { span, href } of [...spans].sort((a, b) => a.span[0] - b.span[0])) {
    if (span[0] < at || span[1] <= span[0]) continue;
    const word = el("mark", {}, text.slice(span[0], span[1]));
    parts.push(text.slice(at, span[0]), href ? el("a", { href }, word) : word);
    at = span[1];
  }
  return [...parts, text.slice(at)];
}

function picture(id, layer, side = 192, kind = "picture") {
  if (!state.about.has_images) return el("div", { className: "noimage" }, "no image here");
  const image = el("img", { loading: "lazy", alt: `${layer} of reference ${id}`, src: `/api/${kind}/${id}/${layer}?side=${side}&of=${state.about.fingerprint.slice(0, 12)}` });
  image.onerror = () => image.replaceWith(el("div", { className: "noimage" }, "no image here"));
  return image;
}

/** A reference as a card; Enter or a click opens it. */
function tile(one, { fact, marks = true } = {}) {
  const open = () => showReference(one.id);
  const card = el("article", {
    className: "tile", tabIndex: 0, "data-id": one.id, "aria-selected": state.marked.has(one.id),
    "aria-label": `${one.noun}: ${one.caption}`, onclick: open,
    onkeydown: (event) => { if (event.key === "Enter" && event.target === card) open(); },
  },
    picture(one.id, state.layer),
    one.suspicious ? el("span", { className: "badge" }, "suspicious") : null,
    el("div", { className: "text" },
      el("div", { className: "caption" }, captionOf(one.caption, [{ span: one.span }])),
      el("div", { className: "facts" }, el("span", {}, fact ?? one.noun), el("span", {}, `score ${one.score.toFixed(2)}`))));
  if (marks) {
    card.append(el("button", {
      className: "pick", title: "Mark as bad (x)", "aria-label": "Mark as bad", tabIndex: -1,
      onclick: (event) => { event.stopPropagation(); mark(one.id, card); },
    }, "✕"));
  }
  if (state.marked.has(one.id)) state.marked.set(one.id, card);
  return card;
}

function layers(root) {
  const names = ["image", "mask", "heatmap", "crop"];
  const buttons = names.map((name) => el("button", {
    type: "button", "aria-pressed": name === state.layer,
    onclick: () => {
      state.layer = name;
      for (const button of buttons) button.setAttribute("aria-pressed", button.textContent === name);
      for (const image of root.querySelectorAll(".tile img")) image.src = image.src.replace(/\/(image|mask|heatmap|crop)\?/, `/${name}?`);
    },
  }, name));
  return el("span", { className: "seg layers", role: "group", "aria-label": "Pictures" }, buttons);
}

// -- nouns -------------------------------------------------------------------------------------

async function nouns(main, [name]) {
  let split = main.querySelector(".split");
  if (!split) {
    split = el("div", { className: "split" }, await words(), el("section", { className: "gallery" }));
    main.replaceChildren(split);
  }
  split.classList.toggle("open", Boolean(name));
  for (const link of split.querySelectorAll(".list a")) {
    if (name && link.hash === nounLink(name)) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  if (!name && matchMedia("(min-width: 761px)").matches) {
    name = split.querySelector(".list a .noun")?.textContent;
    split.querySelector(".list a")?.setAttribute("aria-current", "true");
  }
  if (name) await gallery(split.querySelector(".gallery"), name);
}

async function words() {
  const list = el("ul", { className: "list" });
  const total = el("small");
  let shown = 0;
  let asked = 0;
  async function fill(more) {
    const mine = ++asked;
    const query = new URLSearchParams({ text: kept.search, order: kept.order, start: more ? shown : 0, count: 100 });
    const found = await ask(`/api/nouns?${query}`);
    if (mine !== asked) return;
    if (!more) { list.replaceChildren(); shown = 0; }
    list.querySelector("button")?.parentElement.remove();
    for (const { noun, count } of found.nouns) {
      list.append(el("li", {}, el("a", { href: nounLink(noun) },
        el("span", { className: "noun" }, noun), el("span", { className: "count" }, number(count)))));
    }
    shown += found.nouns.length;
    if (shown < found.total) list.append(el("li", {}, el("button", { onclick: () => fill(true) }, `${number(found.total - shown)} more`)));
    total.textContent = `${number(found.total)} nouns, ${number(state.about.counts.references - state.about.counts.tombstones)} references`;
  }
  const search = el("input", {
    type: "search", placeholder: "Search nouns  /", value: kept.search, "aria-label": "Search nouns",
    oninput: () => { kept.search = search.value; clearTimeout(search.timer); search.timer = setTimeout(fill, 120); },
    onkeydown: (event) => {
      if (event.key === "Enter") { const first = list.querySelector("a"); if (first) location.hash = first.hash; }
    },
  });
  const order = el("select", { "aria-label": "Order", onchange: () => { kept.order = order.value; fill(); } },
    el("option", { value: "count" }, "count"), el("option", { value: "name" }, "A–Z"));
  order.value = kept.order;
  await fill();
  return el("aside", { className: "words" }, el("div", { className: "row" }, search, order), list, total);
}

async function gallery(root, name) {
  const grid = el("div", { className: "grid" });
  const rest = el("button", { className: "more", hidden: true, onclick: () => fill() }, "More");
  let shown = 0;
  async function fill() {
    const query = new URLSearchParams({ noun: name, order: kept.gallery, start: shown, count: PAGE });
    const found = await ask(`/api/noun?${query}`);
    grid.append(...found.references.map((one) => tile(one, { fact: `agreement ${one.agreement.toFixed(2)}` })));
    shown += found.references.length;
    rest.hidden = shown >= found.compared;
    rest.textContent = `More (${number(found.compared - shown)})`;
    return found;
  }
  const found = await fill();
  const orders = [["suspicious", "suspicious first"], ["typical", "typical first"], ["id", "as built"]];
  const order = el("select", { "aria-label": "Order of references", onchange: () => { kept.gallery = order.value; gallery(root, name); } },
    orders.map(([value, text]) => el("option", { value }, text)));
  order.value = kept.gallery;
  const prototypes = el("section");
  root.replaceChildren(
    el("a", { className: "back", href: "#/nouns" }, "← all nouns"),
    el("div", { className: "head" }, el("h1", {}, name), el("span", { className: "muted" },
      `${number(found.count)} references · tightness ${found.tightness?.toFixed(3) ?? "–"} · ${found.suspicious} suspicious`
      + (found.compared < found.count ? ` · ${number(found.compared)} of them compared` : ""))),
    el("div", { className: "chips" }, el("small", {}, "near in text:"), found.neighbours.map((near) =>
      el("a", { className: "chip", href: nounLink(near.noun), title: `cosine ${near.cosine}, ${near.count} references` }, near.noun))),
    el("div", { className: "tools" }, layers(root), order,
      el("button", { onclick: (event) => { event.target.disabled = true; showPrototypes(prototypes, name); } }, "Prototypes")),
    prototypes, grid, rest);
}

async function showPrototypes(root, name) {
  try {
    const found = await ask(`/api/prototypes?noun=${encodeURIComponent(name)}`);
    const own = found.length ? found[0].made_of.join(", ") : "";
    root.replaceChildren(el("h2", {}, `${found.length} prototypes`), el("small", {}, own ? `made from the references of: ${own}` : "none"),
      ...found.map((one) => el("div", {}, el("p", { className: "muted" }, `prototype ${one.prototype + 1}: its nearest references`),
        el("div", { className: "grid small" }, one.references.map((near) => tile(near, { fact: `${near.noun} ${near.cosine.toFixed(2)}` }))))),
      el("h2", {}, "References"));
  } catch (error) {
    note(error.message);
  }
}

export async function showReference(id) {
  const found = await ask(`/api/reference/${id}`).catch((error) => note(error.message));
  if (!found) return;
  const { row } = found;
  const facts = [["noun", row.noun], ["score", row.score.toFixed(3)], ["area", percent(row.area)], ["source", row.source],
    ["box", `${row.x0}, ${row.y0} – ${row.x1}, ${row.y1}`], ["shard", row.shard], ["key", row.key], ["seed", row.seed ?? "–"]];
  sheet.replaceChildren(
    el("button", { className: "close", onclick: () => sheet.close() }, "Close"),
    el("h1", {}, `${row.noun} `, el("small", {}, `reference ${id}`)),
    el("p", {}, captionOf(row.caption, found.image.map(({ noun, span }) => ({ span, href: nounLink(noun) })))),
    el("div", { className: "trio" }, ["image", "heatmap", "mask"].map((layer) =>
      el("figure", {}, picture(id, layer, 512), el("figcaption", {}, layer)))),
    found.image.length > 1 ? el("div", {}, el("small", {}, "in the same image: "), found.image.filter((one) => one.id !== id).map((one) =>
      el("button", { onclick: () => showReference(one.id) }, one.noun))) : null,
    el("div", { className: "tools" },
      el("button", { className: "danger", onclick: () => { mark(id, document.querySelector(`main .tile[data-id="${id}"]`)); sheet.close(); document.getElementById("reason").focus(); } },
        state.marked.has(id) ? "Take the mark back" : "Mark as bad")),
    el("h2", {}, found.neighbours.length ? `Most similar: ${found.same_noun} of ${found.neighbours.length} have the same noun` : "No neighbours"),
    el("div", { className: "grid small" }, found.neighbours.map((near) => tile(near, { fact: `${near.noun} ${near.cosine.toFixed(2)}`, marks: false }))),
    el("h2", {}, "Provenance"),
    el("div", { className: "scroll" }, el("table", {}, facts.map(([key, value]) => el("tr", {}, el("th", {}, key), el("td", {}, String(value)))))));
  if (!sheet.open) sheet.showModal();
  sheet.scrollTop = 0;
}
sheet.addEventListener("click", (event) => {
  if (event.target === sheet) sheet.close();
  if (event.target.closest("a")) sheet.close();
});

// -- coverage ----------------------------------------------------------------------------------

function covered(classes, measured) {
  const counts = {};
  for (const { verdict } of classes) counts[verdict] = (counts[verdict] || 0) + 1;
  const said = { own: "have references of their own", few: "have few", borrowed: "borrow a near noun's", none: "have none" };
  const cosine = (value) => (value === null ? "" : value.toFixed(2));
  const clip = classes.some((one) => one.clip);
  const heads = ["class", "", "stands for it", "references", ...(measured ? ["tight", "outliers", "taken for", "heat", "nearest class"] : []), ...(clip ? ["CLIP"] : [])];
  const numbers = ["references", "tight", "outliers", "heat", "CLIP"];
  const cell = (head, ...content) => el("td", { className: numbers.includes(head) ? "number" : "" }, content);
  return [
    el("p", {}, Object.entries(said).filter(([key]) => counts[key]).map(([key, what]) => `${counts[key]} ${what}`).join(" · ")),
    el("div", { className: "scroll" }, el("table", {},
      el("tr", {}, heads.map((head) => el("th", { className: numbers.includes(head) ? "number" : "" }, head))),
      classes.map((one) => el("tr", {},
        cell("class", one.name, one.synonyms.length ? el("small", {}, ` ${one.synonyms.join(", ")}`) : ""),
        cell("", el("span", { className: `verdict ${one.verdict}` }, one.verdict)),
        cell("stands for it", one.noun ? el("a", { href: nounLink(one.noun) }, one.noun) : "–", one.noun && one.cosine < 0.995 ? ` ${one.cosine.toFixed(2)}` : ""),
        cell("references", number(one.count)),
        ...(measured ? [
          cell("tight", cosine(one.tightness)), cell("outliers", one.outliers ? percent(one.outliers) : ""),
          cell("taken for", one.taken_for ? `${one.taken_for} ${percent(one.taken_share)}` : ""), cell("heat", cosine(one.contrast)),
          cell("nearest class", one.nearest ? `${one.nearest} ${cosine(one.similarity)}` : "", one.confusable ? el("span", { className: "verdict few", title: "as near as its own references: likely to be confused" }, "!") : ""),
        ] : []),
        clip ? cell("CLIP", one.clip ? `${cosine(one.clip.cosine)} ${percent(one.clip.first)}` : "") : null)))),
    el("p", { className: "muted" }, measured
      ? `tight: mean cosine of references to their prototype · taken for: the class that most references nearer to another class are nearest to · heat: contrast of heatmaps${clip ? " · CLIP: mean cosine of their images to the class's text, and for how many of them it is the nearest class" : ""}`
      : "measuring …"),
  ];
}

async function coverage(main) {
  const text = el("textarea", { placeholder: "One class a line, or with commas between them; synonyms after a semicolon", value: kept.classes, "aria-label": "Classes" });
  const out = el("div");
  const clip = el("input", { type: "checkbox" });
  const check = el("button", { className: "main", onclick: async () => {
    kept.classes = text.value;
    check.disabled = true;
    out.replaceChildren(el("p", { className: "muted" }, "comparing …"));
    try {
      // The counts at once, then what takes reading references, then what takes reading images.
      for (const query of ["", "?measured", ...(clip.checked ? ["?measured&clip"] : [])]) {
        const { classes } = await ask(`/api/coverage${query}`, { method: "POST", body: text.value });
        out.replaceChildren(...covered(classes, Boolean(query)));
      }
    } catch (error) {
      out.replaceChildren(el("p", { className: "error" }, error.message));
    }
    check.disabled = false;
  } }, "Check");
  main.replaceChildren(el("h1", {}, "Coverage"),
    el("p", { className: "muted" }, "Coverage of your classes by the collection, the weakest first."),
    text, el("div", { className: "tools" }, check,
      state.about.has_images ? el("label", {}, clip, " ask CLIP about the images") : null), out);
}

// -- segmenting --------------------------------------------------------------------------------

async function segment(main) {
  let file = null;
  const preview = el("div", {}, "Drop a photograph here, paste it, or choose one");
  const input = el("input", { type: "file", accept: "image/*", onchange: () => take(input.files[0]) });
  const drop = el("label", { className: "drop", tabIndex: 0,
    onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") input.click(); },
    ondragover: (event) => { event.preventDefault(); drop.classList.add("over"); },
    ondragleave: () => drop.classList.remove("over"),
    ondrop: (event) => { event.preventDefault(); drop.classList.remove("over"); take(event.dataTransfer.files[0]); } }, preview, input);
  function take(given) {
    if (!given) return;
    file = given;
    const url = URL.createObjectURL(given);
    preview.replaceChildren(el("img", { src: url, alt: "the photograph" }), el("small", { style: { display: "block" } }, given.name));
  }
  main.onpaste = (event) => take([...event.clipboardData.files][0]);
  const text = el("textarea", { placeholder: "Classes to segment: tree, grass, sky", value: kept.classes, "aria-label": "Classes" });
  const boxes = state.about.methods.map((name) => el("label", {}, el("input", { type: "checkbox", value: name, checked: name === "fossil" }), ` ${name} `));
  const out = el("div", { className: "results" });
  const go = el("button", { className: "main", onclick: async () => {
    if (!file) { note("choose a photograph first"); return; }
    kept.classes = text.value;
    const form = new FormData();
    form.append("photograph", file);
    form.append("classes", text.value);
    for (const box of main.querySelectorAll("input[type=checkbox]:checked")) form.append("method", box.value);
    go.disabled = true;
    out.replaceChildren(el("p", { className: "muted" }, "segmenting … (models are loaded the first time)"));
    try {
      const found = await ask("/api/segment", { method: "POST", body: form });
      out.replaceChildren(...Object.entries(found.results).map(([method, result]) => resultOf(method, result, found)));
    } catch (error) {
      out.replaceChildren(el("p", { className: "error" }, error.message));
    }
    go.disabled = false;
  } }, "Segment");
  main.replaceChildren(el("h1", {}, "Segment a photograph"),
    el("p", { className: "muted" }, "Methods side by side. Click a region to see the references behind it."),
    el("div", { className: "form" }, drop, el("div", {}, text, el("div", { className: "tools" }, boxes), go)), out);
}

function resultOf(method, result, { colours, size_hw: [height, width] }) {
  if (result.error) return el("figure", {}, el("h2", {}, method), el("p", { className: "error" }, result.error));
  const why = el("div", { className: "why" });
  const overlay = el("div", { className: "overlay" }, el("img", { src: result.picture, alt: `labels by ${method}` }));
  // Large regions first, so that small ones lie above them and can be clicked.
  result.regions.forEach((region) => {
    const [x0, y0, x1, y1] = region.box;
    const button = el("button", {
      title: region.name, "aria-label": `${region.name}, ${percent(region.area)} of the image`, "aria-pressed": false,
      style: { left: `${100 * x0 / width}%`, top: `${100 * y0 / height}%`, width: `${100 * (x1 - x0) / width}%`, height: `${100 * (y1 - y0) / height}%` },
      onclick: () => explain(region, button),
    });
    overlay.append(button);
  });
  function explain(region, button) {
    for (const other of overlay.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    const own = region.name.trim().toLowerCase();
    const contested = region.others.filter((one) => one.noun !== own).length;
    why.replaceChildren(
      el("h2", {}, el("span", { className: "dot", style: { background: colours[region.name] } }), `${region.name}, ${percent(region.area)} of the image`),
      el("small", {}, "references of this class most similar to the region"),
      el("div", { className: "grid small" }, region.references.map((one) => tile(one, { fact: `${one.noun} ${one.cosine.toFixed(2)}`, marks: false }))),
      el("p", {}, el("small", {}, contested ? `contested: ${contested} of the ${region.others.length} nearest references have other nouns` : "the nearest references all agree")),
      contested ? el("div", { className: "grid small" }, region.others.map((one) => tile(one, { fact: `${one.noun} ${one.cosine.toFixed(2)}`, marks: false }))) : null);
  }
  const seen = [...new Set(result.regions.map((region) => region.name))];
  const figure = el("figure", {}, el("h2", {}, method), overlay,
    el("figcaption", {}, seen.map((name) => el("span", {}, el("span", { className: "dot", style: { background: colours[name] } }), `${name}  `))),
    result.missing.length ? el("small", {}, `no references for ${result.missing.join(", ")}`) : null, why);
  const first = overlay.querySelector("button");
  if (first) explain(result.regions[0], first);
  return figure;
}

// -- filtered ----------------------------------------------------------------------------------

async function filtered(main) {
  const { steps, warnings, dropped } = await ask("/api/filtered");
  const words = {
    unusable_vectors: "embedding not finite or not of unit length", repeated_key: "occurs twice", area: "min_area, max_area",
    score: "min_score", near_duplicate: "duplicate_cosine", noun_agreement: "min_noun_agreement",
    blocked_caption: "blocked_captions", clip_agreement: "min_clip_agreement", entropy: "max_entropy",
    components: "max_components", unsafe: "max_unsafe", outlier: "outlier_deviations",
  };
  main.replaceChildren(el("h1", {}, "Filtered"),
    el("p", { className: "muted" }, "References dropped by the filters of the reduction. Their thresholds are the settings reduce.filter.*; `ovref reduce` quickly applies others."),
    ...warnings.map((text) => el("p", { className: "error" }, text)),
    el("div", { className: "scroll" }, el("table", {},
      el("tr", {}, ["filter", "setting", "before", "after", "dropped"].map((head, at) => el("th", { className: at > 1 ? "number" : "" }, head))),
      steps.map(({ filter, before, after }) => el("tr", {}, el("td", {}, filter), el("td", { className: "muted" }, words[filter] || ""),
        [before, after, before - after].map((count) => el("td", { className: "number" }, number(count))))))),
    dropped === null ? el("p", { className: "muted" }, "The list of dropped references is not here: it is kept where the collection was reduced.") : null,
    dropped && Object.keys(dropped).length ? el("div", { className: "tools" }, layers(main)) : null,
    ...Object.entries(dropped || {}).flatMap(([reason, ones]) => [el("h2", {}, `${reason}: some of them`),
      el("div", { className: "grid" }, ones.map((one) => el("article", { className: "tile", tabIndex: 0 }, picture(one.row, state.layer, 192, "filtered"),
        el("div", { className: "text" }, el("div", { className: "caption" }, one.caption),
          el("div", { className: "facts" }, el("span", {}, `${one.noun}, ${percent(one.area)}`), el("span", {}, `score ${one.score.toFixed(2)}`))))))]));
}

// -- deleted -----------------------------------------------------------------------------------

async function deleted(main) {
  const found = await ask("/api/tombstones");
  const groups = new Map();
  for (const one of found.references) groups.set(one.reason, [...(groups.get(one.reason) || []), one]);
  main.replaceChildren(el("h1", {}, "Deleted references"),
    el("p", { className: "muted" }, found.total
      ? `${number(found.total)} deleted. Whoever opens the collection does not get them; the prototypes are made without them when it is reduced again.`
      : "None. Mark references as bad in a noun’s gallery (x), and delete them with a reason."),
    ...[...groups].flatMap(([reason, ones]) => [
      el("div", { className: "tools" }, el("h2", {}, `${reason} (${ones.length})`),
        el("button", { onclick: async () => {
          try { await change(ones.map((one) => one.id), { undo: true }, `${ones.length} are back`); } catch (error) { note(error.message); }
        } }, "Undo")),
      el("div", { className: "grid" }, ones.map((one) => tile(one, { marks: false }))),
    ]));
  clearMarks();
}

// -- build -------------------------------------------------------------------------------------

async function build(main) {
  async function refresh() {
    let found;
    try { found = await ask("/api/progress"); } catch (error) {
      main.replaceChildren(el("p", { className: "error" }, error.message));
      clearInterval(state.timer);
      return;
    }
    const { now } = found;
    const words = { running: "running", done: "done", ended: "ended early", gone: "no update for a while: stopped or killed" };
    main.replaceChildren(
      el("div", { className: "head" }, el("h1", {}, "Build"), now ? el("span", { className: "verdict" }, words[now.state] || now.state) : null,
        now ? el("small", {}, `${time(now.age_seconds)} ago`) : null),
      now ? el("p", {}, now.doing, now.cost !== null ? ` · cost ${now.cost.toFixed(2)} so far` : "") : el("p", { className: "muted" }, "This build was made by a version that did not record its progress."),
      ...found.steps.map((step) => stepOf(step, now?.steps?.[step.step])),
      el("p", { className: "muted" }, found.published ? "The collection is published." : "There is no collection yet."));
    if (found.published && !state.about.collection) location.reload();
  }
  await refresh();
  clearInterval(state.timer);
  state.timer = setInterval(refresh, 2000);
}

function stepOf(step, now) {
  const total = now?.records ?? null;
  const done = now?.records_done ?? step.inputs;
  const share = step.complete ? 1 : total ? done / total : step.shards ? step.committed / step.shards : 0;
  const facts = [];
  if (!step.begun) facts.push("not begun");
  else facts.push(`${number(done)}${total ? ` of ${number(total)}` : ""} records`, `${number(step.outputs)} out`);
  if (!step.complete && now?.records_per_second) facts.push(`${now.records_per_second.toPrecision(3)} records/s`);
  if (!step.complete && now?.seconds_to_go) facts.push(`${time(now.seconds_to_go)} to go`);
  if (!step.complete && now?.gpu) facts.push(`GPU ${now.gpu.busy === null ? "" : `${percent(now.gpu.busy)} busy, `}${(now.gpu.used_bytes / 1e9).toFixed(1)} of ${(now.gpu.total_bytes / 1e9).toFixed(0)} GB`);
  const drops = Object.entries({ ...step.dropped, ...step.dropped_parts });
  return el("section", { className: "step" },
    el("div", { className: "head" }, el("strong", {}, step.step), el("small", {}, facts.join(" · "))),
    el("div", { className: "bar", role: "progressbar", "aria-valuenow": Math.round(100 * share), "aria-label": step.step }, el("i", { style: { width: `${100 * share}%` } })),
    drops.length ? el("small", {}, `dropped: ${drops.map(([reason, count]) => `${count} ${reason}`).join(", ")}`) : null,
    step.quarantined.length ? el("p", { className: "error" }, `${step.quarantined.length} shards failed for good: ${step.quarantined.slice(0, 5).join(", ")}`) : null);
}
