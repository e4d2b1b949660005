// The page: an image and sentences in, masks drawn over the image. Masks come from backend.js; threshold and minimum
// presence are applied here. Everything drawn is also announced in words.

import * as backend from "./backend.js";
import { canvasOf, enlarge, paintHeat, paintMasks, swatch } from "./drawing.js";
import { annotate, isPresent, maskOf, measure, strongestPlace } from "./masks.js";
import { isBlank } from "./sentences.js";

const $ = (id) => document.getElementById(id);
const SIDE = 960; // longer side of the drawn image, in pixels
const TYPES = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/avif"];

let image = null; // {blob, name, bitmap}
let results = []; // {text, score, presence, probability, words, values: probability at the drawn size, visible, summary: element}
let hoveredWord = null, pinnedWord = null; // words whose map is drawn, the hovered one first
let job = null; // AbortController of the running job
let frame = 0; // requested animation frame
const context = $("view").getContext("2d", { willReadFrequently: true });

// ---- images in

async function openImage(blob, name) {
  announce("error", "");
  let bitmap;
  try {
    if (blob.type && !TYPES.includes(blob.type)) throw new TypeError();
    bitmap = await createImageBitmap(blob);
  } catch {
    announce("error", `${name} is not an image that this page can show: choose a JPEG, PNG, WebP, GIF or BMP file.`);
    return false;
  }
  job?.abort();
  image = { blob, name, bitmap };
  clearResults();
  const scale = SIDE / Math.max(bitmap.width, bitmap.height), scaled = (side) => Math.max(1, Math.round(side * scale));
  Object.assign($("view"), { width: scaled(bitmap.width), height: scaled(bitmap.height) });
  $("view").hidden = false;
  $("stage").classList.remove("empty");
  $("name").textContent = `${name}, ${bitmap.width} × ${bitmap.height}`;
  draw();
  announce("status", `Image ${name} is shown.`);
  return true;
}

function clearResults() {
  results = [];
  hoveredWord = pinnedWord = null;
  $("results").hidden = true;
  document.body.classList.remove("found");
  $("legend").replaceChildren();
}

$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (file) await openImage(file, file.name);
  $("file").value = ""; // the same file may be chosen again
});

let dragDepth = 0;
document.addEventListener("dragenter", (event) => { event.preventDefault(); dragDepth++; $("stage").classList.add("over"); });
document.addEventListener("dragleave", () => { if (--dragDepth <= 0) $("stage").classList.remove("over"); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  dragDepth = 0;
  $("stage").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) openImage(file, file.name);
  else announce("error", "What you dropped is not a file: save the image first, then drop it here.");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) openImage(file, "The pasted image");
});

async function showExamples() {
  const response = await fetch(new URL("examples/examples.json", import.meta.url));
  for (const [index, { file, sentences }] of (await response.json()).examples.entries()) {
    const name = `Example ${index + 1}`, address = new URL(`examples/${file}`, import.meta.url);
    const thumbnail = element("img", { src: address, alt: `${name}: ${sentences.join(", ")}`, width: 112, height: 112 });
    const button = element("button", { type: "button" }, thumbnail);
    button.addEventListener("click", async () => {
      if (!(await openImage(await (await fetch(address)).blob(), name))) return;
      $("sentences").value = sentences.join("\n");
      find();
    });
    $("examples").querySelector("ul").append(element("li", {}, button));
  }
  $("examples").hidden = false;
}

// ---- the job

async function find() {
  const sentences = $("sentences").value.split("\n").map((line) => line.trim()).filter((line) => !isBlank(line));
  announce("error", "");
  if (!image) return complain("Choose an image first, or click an example.", $("file"));
  if (!sentences.length) return complain("Type at least one sentence that says what to look for.", $("sentences"));
  job?.abort();
  const thisJob = (job = new AbortController());
  clearResults();
  draw();
  setBusy(true);
  try {
    const onProgress = (fraction, words) => thisJob === job && showProgress(fraction, words);
    const response = await backend.segment(image.blob, sentences, onProgress, thisJob.signal);
    if (thisJob !== job) return;
    results = response.results.map((result) => ({ ...result, values: enlarge(result.probability, $("view")), visible: true }));
    showLegend();
    draw();
    announce("status", results.map((result, index) => `${index + 1}: ${result.text}, ${measure(result, limits()).words}`).join(". "));
  } catch (error) {
    if (thisJob === job && error.name !== "AbortError") announce("error", error.message);
  } finally {
    if (thisJob === job) { job = null; setBusy(false); }
  }
}

function complain(words, field) {
  announce("error", words);
  field.focus();
}

function setBusy(busy) {
  $("find").disabled = busy;
  $("stop").hidden = $("progress").hidden = !busy;
  $("image").setAttribute("aria-busy", busy);
  if (busy) $("bar").removeAttribute("value");
}

function showProgress(fraction, words) {
  if (fraction > 0) $("bar").value = fraction;
  $("words").textContent = words;
  announce("status", words);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); find(); });
$("sentences").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); find(); } });
$("stop").addEventListener("click", () => { job?.abort(); job = null; setBusy(false); announce("status", "Stopped."); $("find").focus(); });

// ---- results

function showLegend() {
  $("legend").replaceChildren(...results.map(legendItem));
  $("results").hidden = false;
  document.body.classList.add("found");
  showMeasures();
}

function legendItem(result, index) {
  const show = element("input", { type: "checkbox", checked: true });
  show.addEventListener("change", () => { result.visible = show.checked; item.classList.toggle("off", !show.checked); draw(); });
  const save = element("button", { type: "button", className: "link", ariaLabel: `Download mask ${index + 1} (PNG)` }, "Mask (PNG)");
  save.addEventListener("click", () => saveMask(result, index));
  result.summary = element("span", {});
  const label = element("label", {}, show, "Show", element("span", { className: "unseen" }, ` mask ${index + 1}`));
  const item = element("li", {}, swatch(index), sentenceLine(result), element("div", { className: "about" }, result.summary, label, save));
  return item;
}

/** The sentence, each word that has a map as a button. */
function sentenceLine({ text, words }) {
  const line = element("p", { className: "sentence" });
  let end = 0;
  for (const word of words) {
    line.append(text.slice(end, word.start));
    end = word.end;
    line.append(word.map ? wordButton(word, text.slice(word.start, word.end)) : word.text);
  }
  line.append(text.slice(end));
  return line;
}

/** Shows the map of a word while it is hovered or focused; a click pins it. */
function wordButton(word, text) {
  const button = element("button", { type: "button", className: "word", ariaPressed: "false" }, text);
  const show = () => { hoveredWord = word; draw(); };
  const hide = () => { if (hoveredWord === word) { hoveredWord = null; draw(); } };
  button.addEventListener("mouseenter", show);
  button.addEventListener("focus", () => { show(); announce("status", `Map of the word ${word.text}: strongest at the ${strongestPlace(word.map)}.`); });
  button.addEventListener("mouseleave", hide);
  button.addEventListener("blur", hide);
  button.addEventListener("click", () => {
    const pin = pinnedWord !== word;
    unpin();
    if (pin) { pinnedWord = word; button.ariaPressed = "true"; }
  });
  return button;
}

function unpin() {
  const pressed = $("legend").querySelector("[aria-pressed=true]");
  if (pressed) pressed.ariaPressed = "false";
  hoveredWord = pinnedWord = null;
  draw();
}

document.addEventListener("keydown", (event) => { if (event.key === "Escape") unpin(); });

function showMeasures() {
  for (const result of results) {
    const { score, words } = measure(result, limits());
    const bar = element("i", {});
    bar.style.width = `${100 * score}%`;
    result.summary.replaceChildren(element("span", { className: "meter", ariaHidden: "true" }, bar), words);
  }
}

const limits = () => ({ threshold: Number($("threshold").value), minScore: Number($("min-score").value) });

function showLimits() {
  for (const id of ["threshold", "min-score"]) $(`${id}-shown`).textContent = Number($(id).value).toFixed(2);
  showMeasures();
  draw();
}

for (const id of ["threshold", "min-score"]) {
  $(id).addEventListener("input", showLimits);
  $(id).addEventListener("change", () => announce("status", results.map((result, index) => `${index + 1}: ${measure(result, limits()).words}`).join(". ")));
}

// ---- drawing

/** Draw once per frame, however often it is called. */
function draw() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(paint);
}

function paint() {
  if (!image) return;
  const { width, height, clientWidth } = $("view"), word = hoveredWord ?? pinnedWord;
  context.clearRect(0, 0, width, height);
  context.drawImage(image.bitmap, 0, 0, width, height);
  const masks = results.map((result, index) => ({ ...result, index })).filter((result) => result.visible && isPresent(result, limits()));
  if (word) paintHeat(context, word.map);
  else if (masks.length) paintMasks(context, masks, 255 * limits().threshold, (13 * width) / (clientWidth || width)); // numbers as large on a phone
  const count = masks.length === 1 ? "1 mask" : `${masks.length} masks`;
  $("view").ariaLabel = word ? `Image with the map of the word ${word.text}` : `Image ${image.name}${masks.length ? ` with ${count}` : ""}`;
}

// ---- downloads

const stem = () => image.name.replace(/\.[^.]*$/, "").replace(/[^\w-]+/g, "-").toLowerCase() || "image";

function download(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  announce("status", `${name} is saved.`);
}

function saveMask(result, index) {
  const { width, height } = image.bitmap, layer = new ImageData(width, height);
  for (const [at, value] of maskOf(result, limits(), image.bitmap).entries()) layer.data.set([value, value, value, 255], 4 * at);
  canvasOf(layer).toBlob((blob) => download(blob, `${stem()}_${index + 1}_mask.png`));
}

$("save-image").addEventListener("click", () => {
  unpin();
  paint();
  $("view").toBlob((blob) => download(blob, `${stem()}_masks.png`));
});

$("save-rle").addEventListener("click", () => {
  const { width, height } = image.bitmap;
  const annotations = results.map((result) => {
    const score = Number(measure(result, limits()).score.toFixed(4));
    const presence = Number(result.presence.toFixed(4));
    return { text: result.text, score, presence, ...annotate(maskOf(result, limits(), image.bitmap), image.bitmap) };
  });
  const { threshold, minScore } = limits();
  const content = { image: { file_name: image.name, width, height }, threshold, min_score: minScore, annotations };
  download(new Blob([JSON.stringify(content)], { type: "application/json" }), `${stem()}_masks.json`);
});

// ---- helpers

function element(tag, properties, ...children) {
  const created = Object.assign(document.createElement(tag), properties);
  created.append(...children);
  return created;
}

function announce(id, words) {
  $(id).textContent = words;
}

// ---- start

try {
  setBusy(true);
  $("stop").hidden = true;
  const { model, minScore } = await backend.load(showProgress);
  $("min-score").value = minScore;
  showLimits();
  const isScenes = !model || model === "scenes";
  $("note").hidden = !isScenes;
  if (isScenes) await showExamples();
  announce("status", "Ready.");
} catch (error) {
  announce("error", error.message);
} finally {
  setBusy(false);
}
