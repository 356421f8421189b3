"use strict";

// Pixels can't be read from a page that was opened from the disk, so masks, outlines and errors are made by SVG filters
// on the pictures: exact for 8 bits, since their tables have an entry for each of the 256 values.

const data = JSON.parse(document.getElementById("data").textContent);
const isTwo = data.threshold !== null;
const cards = [...document.querySelectorAll(".card")];
const find = (selector, parent = document) => parent.querySelector(selector);
const imageOf = (card) => data.images[card.dataset.image];
const state = {
  score: data.sortedBy,
  worstFirst: true,
  threshold: data.threshold, // 8-bit values above it are foreground
  classes: new Set(data.classes.map((_, k) => k).filter((k) => !data.classes[k].background)), // those that are shown
  shown: cards, // in their order
  open: null, // card that is shown large
};
const view = { scale: 1, x: 0.5, y: 0.5 }; // zoom over the whole image, and the part of the image in the middle

// --- filters

function make(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const html = (name, attributes, ...children) => make(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) =>
  make(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
const matrix = (values, attributes = {}) => svg("feColorMatrix", { values, ...attributes });
const within = (colour, mask, operator = "in") => svg("feComposite", { in: colour, in2: mask, operator });
const flood = (colour) => svg("feFlood", { "flood-color": colour, result: "colour" });

/** Primitives that make a picture white where a test holds for all its channels, and transparent elsewhere. */
function where(tests, result) {
  const transfer = svg("feComponentTransfer", { in: "SourceGraphic" });
  for (const [k, channel] of ["R", "G", "B"].entries()) {
    const tableValues = Array.from({ length: 256 }, (_, value) => Number(tests[k](value))).join(" ");
    transfer.append(svg(`feFunc${channel}`, { type: "discrete", tableValues }));
  }
  return [transfer, matrix("0 0 0 0 1  0 0 0 0 1  0 0 0 0 1  1 1 1 1 -3", { result })];
}

const channelsOf = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

function ofColour(colour, result) {
  return where(channelsOf(colour).map((channel) => (value) => value === channel), result);
}

const merge = (parts, result) => svg("feMerge", { result }, ...parts.map((part) => svg("feMergeNode", { in: part })));
const nothing = (result) => svg("feFlood", { "flood-opacity": 0, result });
const partsOf = () => [...state.classes].map((k) => `class${k}`);

/** Primitives whose result `shape` is the classes that are shown, each a part of it, of a picture of classes. */
function ofClasses() {
  const made = [...state.classes].flatMap((k) => ofColour(data.classes[k].colour, `class${k}`));
  return made.length ? [...made, merge(partsOf(), "shape")] : [nothing("shape")];
}

/** The same of an output: with two classes, of the probability of class 1. */
function ofOutput() {
  if (!isTwo) return ofClasses();
  const isInverted = data.classes[1].background;
  const test = (value) => (isInverted ? 255 - value : value) > state.threshold;
  return where([test, test, test], "shape");
}

const colouredBy = (colour) => [flood(colour), within("colour", "shape")];

/** Primitives whose result is what is not annotated of a picture of a label. */
const ofUnknown = (result) => ofColour("#" + data.notAnnotated.toString(16).repeat(3), result);

/** Primitives that draw the inner rim of some parts, but not where they end at `open`. */
function outline(colour, radius, parts, open) {
  const rims = parts.flatMap((part) => {
    const rim = within(part, "inner", "out");
    rim.setAttribute("result", `rim-${part}`);
    return [merge([part, open], "wide"), svg("feMorphology", { operator: "erode", radius, result: "inner" }), rim];
  });
  const all = parts.length ? merge(parts.map((part) => `rim-${part}`), "rim") : nothing("rim");
  return [...rims, all, flood(colour), within("colour", "rim")];
}

/** Label in red and output in green, both on the pixels of the wrong class in blue, become missed, added, confused. */
function errorColours() {
  const colours = [data.colours.label, data.colours.output, data.colours.confused ?? "#000000"].map(channelsOf);
  const rows = [0, 1, 2].map((channel) => `${colours.map((colour) => colour[channel] / 255).join(" ")} 0 0`);
  return [
    matrix("1 -1 0 0 0  -1 1 0 0 0  1 1 1 0 -2  0 0 0 0 1"),
    matrix(`${rows.join("  ")}  1 1 1 0 0`),
  ];
}

/** What is not annotated in red, and green stripes everywhere, become light stripes on grey where there is red. */
function veil() {
  return [
    matrix("1 1 0 0 -1  1 0 0 0 0  0 0 0 0 0  0 0 0 0 1"),
    matrix("0.6 0 0 0 0.3  0.6 0 0 0 0.3  0.6 0 0 0 0.3  0 0.75 0 0 0"),
  ];
}

function anyDifference() {
  const transfer = svg("feComponentTransfer", {});
  const tableValues = ["0", ...Array(255).fill("1")].join(" ");
  for (const channel of "RGB") transfer.append(svg(`feFunc${channel}`, { type: "discrete", tableValues }));
  return [transfer, matrix("0 0 0 0 0  0 0 0 0 0  1 1 1 0 0  1 1 1 0 0")];
}

/** Picture as it is shown alone: white is the foreground; of several classes those that are shown, on black. */
function alone() {
  if (!isTwo) {
    const shown = merge(["shape", "unknown"], "shown");
    return [...ofClasses(), ...ofUnknown("unknown"), shown, within("SourceGraphic", "shown")];
  }
  return data.classes[1].background ? [matrix("-1 0 0 0 1  0 -1 0 0 1  0 0 -1 0 1  0 0 0 1 0")] : [svg("feOffset", {})];
}

/** Primitives of each filter, by its name in the style. */
function filters() {
  const { label, output } = data.colours;
  const parts = isTwo ? ["shape"] : partsOf();
  const own = [within("SourceGraphic", "shape")];
  return {
    "label-fill": [...ofClasses(), ...(isTwo ? colouredBy(label) : own)],
    "output-fill": [...ofOutput(), ...(isTwo ? colouredBy(output) : own.map((one) => one.cloneNode()))],
    "label-line": [...ofClasses(), ...ofUnknown("unknown"), ...outline(label, 2, parts, "unknown")],
    "output-line": [...ofOutput(), nothing("none"), ...outline(output, 1, parts, "none")],
    "label-signal": [...ofClasses(), ...colouredBy("#f00")],
    "output-signal": [...ofOutput(), ...colouredBy("#0f0")],
    "label-shown": alone(),
    "output-shown": alone(),
    differs: anyDifference(),
    errors: errorColours(),
    unknown: [...ofUnknown("shape"), ...colouredBy("#000")],
    "unknown-signal": [...ofUnknown("shape"), ...colouredBy("#f00")],
    veil: veil(),
  };
}

/** Draw the filters whose name begins so; the browser paints anew what they are on. */
function drawFilters(beginning = "") {
  const area = { x: 0, y: 0, width: "100%", height: "100%", "color-interpolation-filters": "sRGB" };
  for (const [id, primitives] of Object.entries(filters())) {
    if (!id.startsWith(beginning)) continue;
    document.getElementById(id)?.remove();
    find("#filters").append(svg("filter", { id, ...area }, ...primitives));
  }
}

// --- layers, threshold and classes

const isOn = (name) => document.body.dataset.layers.split(" ").includes(name);
const HIDES = { objects: "errors", errors: "objects" }; // two maps in colours can't be seen at once

function toggleLayer(name) {
  const box = find(`[data-layer="${name}"]`);
  if (!box) return;
  const on = new Set(document.body.dataset.layers.split(" "));
  box.checked = !on.delete(name);
  if (box.checked) on.add(name);
  document.body.dataset.layers = [...on].join(" ");
  if (box.checked && HIDES[name] && isOn(HIDES[name])) toggleLayer(HIDES[name]);
}

/** Show the inputs brighter by a power of two: their white is that much lower than the picture's. */
function setContrast(power) {
  const slider = find("#contrast");
  slider.value = power;
  const factor = 2 ** Number(slider.value);
  find("#contrast-value").value = `\u00d7${+factor.toPrecision(2)}`;
  document.documentElement.style.setProperty("--contrast", factor === 1 ? "none" : `brightness(${factor})`);
}

function toggleClass(k) {
  if (!state.classes.delete(k)) state.classes.add(k);
  drawFilters();
}

const percent = (fraction) => `${(100 * fraction).toFixed(2)} %`;
const number = (value, name) => (data.counts?.includes(name) ? String(value) : value.toFixed(value >= 10 ? 1 : 4));
const errorAt = (image) => image.wrong[state.threshold] / image.valid;

/** Pixel error of an image at the threshold; empty with more than two classes, and without a label. */
function errorText(image) {
  return image.wrong.length ? `pixel error ${percent(errorAt(image))} at threshold ${find("#threshold-value").value}` : "";
}

function setThreshold(value) {
  state.threshold = Math.min(254, Math.max(0, value));
  find("#threshold").value = state.threshold;
  find("#threshold-value").value = ((state.threshold + 0.5) / 255).toFixed(2);
  find("#threshold-flag").textContent = `--threshold ${find("#threshold-value").value}`;
  drawFilters("output-");
  for (const line of document.querySelectorAll(".live")) line.textContent = errorText(imageOf(line.closest(".card")));
  const errors = Object.values(data.images).filter((image) => image.wrong.length).map(errorAt);
  const mean = errors.reduce((sum, error) => sum + error, 0) / errors.length;
  find("#threshold-error").value = errors.length ? `mean pixel error ${percent(mean)}` : "";
  if (state.open) showScores();
}

/** Write what stands below the picture of a card. */
function fill(card) {
  const image = imageOf(card);
  card.append(find("#below").content.cloneNode(true));
  find(".wipe", card)?.setAttribute("aria-label", `Wipe to the output of ${image.title}`);
  find(".live", card).textContent = errorText(image);
  find(".about", card).textContent = image.about;
  find(".objects-of", card).textContent = image.objects;
  const isMain = ([name]) => data.mainScores.some((beginning) => name.startsWith(beginning));
  const scores = Object.entries(image.scores).map(([name, value]) => [name, number(value, name)]);
  const term = (name) => html("dt", { title: data.meanings[name] }, name);
  const rows = scores.filter(isMain).map((row) => html("div", {}, term(row[0]), html("dd", {}, row[1])));
  find("dl", card).append(...rows);
  const more = scores.filter((row) => !isMain(row)).map((row) => row.join(" ")).join(", ");
  find("details p", card).textContent = more;
  find("details", card).hidden = !more;
}

/** A card is filled when it comes near the window, and has layers as long as it is there: many images are no burden. */
const nearby = new IntersectionObserver(
  (entries) => {
    for (const { target: card, isIntersecting } of entries) {
      for (const layer of card.querySelectorAll(".layer")) layer.remove();
      if (!isIntersecting) continue;
      if (!find(".about", card)) fill(card);
      find("img", card).after(find("#layers").content.cloneNode(true));
    }
  },
  { rootMargin: "300px" },
);

// --- order

function sortCards() {
  const sign = data.lowIsGood.includes(state.score) === state.worstFirst ? -1 : 1;
  const score = (card) => imageOf(card).scores[state.score];
  const known = (card) => Number(score(card) !== undefined);
  const order = (a, b) => known(b) - known(a) || (known(a) && sign * (score(a) - score(b))); // of equals as before
  const wanted = find("#filter").value.trim().toLowerCase();
  const sorted = [...cards].sort(order);
  for (const card of sorted) card.hidden = !`${imageOf(card).title} ${card.dataset.image}`.toLowerCase().includes(wanted);
  find("#cards").append(...sorted);
  state.shown = sorted.filter((card) => !card.hidden);
  find("#cards").style.setProperty("--num", state.shown.length);
  find("#count").value = wanted ? `${state.shown.length} of ${cards.length}` : "";
  drawChart();
}

function sortBy(name) {
  state.worstFirst = state.score !== name || !state.worstFirst;
  state.score = name;
  find("#sort").value = name;
  find("#direction").textContent = data.directions[Number(!state.worstFirst)];
  for (const button of document.querySelectorAll(".by")) button.setAttribute("aria-pressed", button.dataset.score === name);
  sortCards();
}

/** Score of each image in the order of the cards; each point leads to its card. */
function drawChart() {
  const chart = find("#chart");
  if (!chart?.clientWidth) return; // there is none, or it is folded
  const rows = state.shown.filter((card) => imageOf(card).scores[state.score] !== undefined);
  const values = rows.map((card) => imageOf(card).scores[state.score]);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const [width, height, left] = [chart.clientWidth, chart.clientHeight, 56];
  const x = (k) => left + ((width - left - 8) * (k + 0.5)) / rows.length;
  const y = (value) => (high > low ? height - 10 - ((height - 20) * (value - low)) / (high - low) : height / 2);
  const points = rows.map((card, k) => {
    const text = `${imageOf(card).title}: ${state.score} ${values[k].toFixed(4)}`;
    const circle = svg("circle", { cx: x(k), cy: y(values[k]), r: rows.length > 200 ? 3 : 5 }, svg("title", {}, text));
    return svg("a", { href: `#${card.id}`, tabindex: -1 }, circle);
  });
  const scale = (high > low ? [low, high] : [low]).filter(Number.isFinite).flatMap((value) => [
    svg("line", { class: "grid", x1: left, x2: width, y1: y(value), y2: y(value) }),
    svg("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(4)),
  ]);
  chart.replaceChildren(...scale, ...points);
  find("#chart-title").textContent = `${state.score} of each image; a point leads to its image`;
}

function leadTo(card) {
  for (const other of cards) other.classList.toggle("found", other === card);
  card.scrollIntoView({ block: "start" });
  find(".stage", card).focus({ preventScroll: true });
}

// --- large view

const large = find("#large");

function panel(title, layer) {
  const stage = html("div", { class: "stage", role: "img", "aria-label": title }, html("span", { class: `layer ${layer}` }));
  return html("figure", {}, html("figcaption", {}, title), stage);
}

function panelsOf(card) {
  const made = [panel("input with layers", "input"), panel("output", "output-shown")];
  find(".stage", made[0]).append(find("#layers").content.cloneNode(true));
  find(".wiped", made[0])?.remove();
  if (!find("#layers").content.querySelector(".wiped")) return [made[0]]; // a page without outputs
  if (!card.classList.contains("unlabelled")) {
    made.splice(1, 0, panel("label", "label-shown"));
    made.push(panel("errors", "input dim"));
    const layers = find("#layers").content.cloneNode(true);
    const errors = find(".errors", layers);
    errors.classList.add("always");
    find(".stage", made[3]).append(find(".veil", layers), errors);
  }
  return made;
}

function open(card) {
  state.open = card;
  const panels = find(".panels");
  panels.className = `panels ${card.classList.contains("unlabelled") ? "unlabelled" : ""}`;
  panels.style.cssText = find(".stage", card).style.cssText;
  panels.style.setProperty("--input", `url("${find("img", card).src}")`);
  panels.replaceChildren(...panelsOf(card));
  make(find("#large-title"), { title: imageOf(card).title }, []).textContent = imageOf(card).short;
  showScores();
  if (!large.open) {
    find(".toolbar-place", large).append(find(".tools")); // the one toolbar, as a dialog shuts off the page
    large.showModal();
  }
  Object.assign(view, { scale: 1, x: 0.5, y: 0.5 });
  place();
}

function showScores() {
  const image = imageOf(state.open);
  const parts = Object.entries(image.scores).slice(0, 2).map(([name, value]) => `${name} ${number(value, name)}`);
  find("#large-scores").textContent = [...parts, errorText(image), image.objects].filter(Boolean).join(", ");
}

function step(by) {
  const at = state.shown.indexOf(state.open) + by;
  if (state.shown[at]) open(state.shown[at]);
}

/** Size [px] of a panel, and of the image in it. */
function sizes() {
  const { clientWidth: width, clientHeight: height } = find(".panels .stage");
  const image = imageOf(state.open);
  const fit = Math.min(width / image.width, height / image.height) * view.scale;
  return { width, height, imageWidth: image.width * fit, imageHeight: image.height * fit };
}

/** Show the same part of the image in all panels. */
function place() {
  const panels = find(".panels");
  const wide = large.clientWidth / large.clientHeight > 2.4 || panels.children.length <= 2;
  panels.style.setProperty("--columns", wide ? panels.children.length : 2);
  panels.style.setProperty("--rows", wide ? 1 : 2);
  const { width, height, imageWidth, imageHeight } = sizes();
  const [left, top] = [width / 2 - view.x * imageWidth, height / 2 - view.y * imageHeight];
  panels.style.setProperty("--size", `${imageWidth}px ${imageHeight}px`);
  panels.style.setProperty("--position", `${left}px ${top}px`);
  drawScale(imageWidth);
}

function drawScale(imageWidth) {
  const { pixelSize, width } = imageOf(state.open);
  const stage = find(".panels .stage");
  find(".scale", stage)?.remove();
  if (!pixelSize) return;
  const micron = (pixelSize * width) / imageWidth; // of a pixel of the screen
  const rough = (stage.clientWidth / 4) * micron;
  const power = 10 ** Math.floor(Math.log10(rough));
  const length = Math.max(...[1, 2, 5].map((digit) => digit * power).filter((value) => value <= rough));
  const [unit, size] = length < 1 ? ["nm", 1000] : length < 1000 ? ["µm", 1] : ["mm", 0.001];
  const text = `${+(size * length).toPrecision(3)} ${unit}`;
  stage.append(html("span", { class: "scale", style: `width: ${length / micron}px` }, text));
}

function moveTo(x, y) {
  view.x = Math.min(1, Math.max(0, x));
  view.y = Math.min(1, Math.max(0, y));
  place();
}

/** Zoom by a factor; the point of the image at (x, y) [px from the middle of a panel] stays there. */
function zoom(factor, x = 0, y = 0) {
  const scale = Math.min(64, Math.max(1, view.scale * factor));
  const { imageWidth, imageHeight } = sizes();
  const kept = 1 - view.scale / scale;
  view.scale = scale;
  if (scale === 1) moveTo(0.5, 0.5);
  else moveTo(view.x + (kept * x) / imageWidth, view.y + (kept * y) / imageHeight);
}

function zoomByWheel(event) {
  const stage = event.target.closest(".stage");
  if (!stage) return;
  event.preventDefault();
  const box = stage.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
  zoom(2 ** (-event.deltaY / 300), x, y);
}

function drag(event) {
  if (event.buttons !== 1) return;
  const { imageWidth, imageHeight } = sizes();
  moveTo(view.x - event.movementX / imageWidth, view.y - event.movementY / imageHeight);
}

function closeLarge() {
  find("main .toolbar-place").append(find(".tools"));
  const card = state.open;
  state.open = null;
  leadTo(card);
}

// --- keys

const KEYS = {
  l: () => toggleLayer("label-line"),
  o: () => toggleLayer("output-line"),
  e: () => toggleLayer("errors"),
  L: () => toggleLayer("label-fill"),
  O: () => toggleLayer("output-fill"),
  b: () => toggleLayer("objects"),
  "{": () => setContrast(Number(find("#contrast").value) - 0.5),
  "}": () => setContrast(Number(find("#contrast").value) + 0.5),
  "[": () => isTwo && setThreshold(state.threshold - 5),
  "]": () => isTwo && setThreshold(state.threshold + 5),
  "?": toggleHelp,
  "/": () => state.open || find("#filter").focus(),
};
const LARGE_KEYS = {
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
  "+": () => zoom(1.5),
  "-": () => zoom(1 / 1.5),
  0: () => zoom(0),
};

function toggleHelp() {
  const help = find("#help");
  if (help.open) help.close();
  else help.showModal();
}

function press(event) {
  const isText = event.target.matches("input[type=search], select");
  const isSlider = event.target.matches("input[type=range]") && event.key.startsWith("Arrow");
  const action = KEYS[event.key] ?? (state.open && LARGE_KEYS[event.key]);
  if (!action || isText || isSlider || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  action();
}

// --- start

const on = (selector, event, action, options) => find(selector)?.addEventListener(event, action, options);

function listenOnPage() {
  on(".toolbar", "change", ({ target }) => {
    if (target.dataset.layer) toggleLayer(target.dataset.layer);
    if (target.dataset.class) toggleClass(Number(target.dataset.class));
  });
  on("#threshold", "input", ({ target }) => setThreshold(Number(target.value)));
  for (const button of document.querySelectorAll(".jump")) {
    button.addEventListener("click", () => setThreshold(Number(button.dataset.threshold)));
  }
  on("#sort", "change", ({ target }) => sortBy(target.value));
  on("#direction", "click", () => sortBy(state.score));
  on("#contrast", "input", ({ target }) => setContrast(target.value));
  on("#contrast-reset", "click", () => setContrast(0));
  on(".fold", "toggle", drawChart);
  on(".scores", "click", ({ target }) => target.dataset.score && sortBy(target.dataset.score));
  on("#filter", "input", sortCards);
  on("#chart", "click", (event) => {
    event.preventDefault();
    const point = event.target.closest("a");
    if (point) leadTo(find(point.getAttribute("href")));
  });
  on("#cards", "click", ({ target }) => target.closest(".stage") && open(target.closest(".card")));
  on("#cards", "input", ({ target }) => {
    if (target.matches(".wipe")) find(".stage", target.closest(".card")).style.setProperty("--wipe", `${target.value}%`);
  });
}

function listenInLargeView() {
  for (const button of document.querySelectorAll(".show-help")) button.addEventListener("click", toggleHelp);
  on("#previous", "click", () => step(-1));
  on("#next", "click", () => step(1));
  on("#zoom-in", "click", () => zoom(1.5));
  on("#zoom-out", "click", () => zoom(1 / 1.5));
  on("#zoom-reset", "click", () => zoom(0));
  on("#close", "click", () => large.close());
  on("#large", "close", closeLarge);
  on(".panels", "wheel", zoomByWheel, { passive: false });
  on(".panels", "pointermove", drag);
  document.addEventListener("keydown", press);
  window.addEventListener("resize", () => (state.open ? place() : drawChart()));
}

document.body.append(svg("svg", { id: "filters", width: 0, height: 0, "aria-hidden": true, style: "position: absolute" }));
drawFilters();
if (isTwo) setThreshold(data.threshold);
for (const button of document.querySelectorAll(".by")) button.setAttribute("aria-pressed", button.dataset.score === state.score);
for (const card of cards) nearby.observe(card);
const narrow = matchMedia("(max-width: 599px)"); // there the tools would fill the window
narrow.addEventListener("change", () => (find(".tools").open = !narrow.matches));
find(".tools").open = !narrow.matches;
listenOnPage();
listenInLargeView();
