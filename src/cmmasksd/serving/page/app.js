// The page: a picture and sentences in, masks drawn over the picture. It knows nothing of where masks come from
// (backend.js does), and moves the threshold by itself, on the probability maps.
//
// Colour is never the only carrier: each mask has a number, a pattern of its own and an outline, and whatever is drawn
// is also said in words.

import * as backend from "./backend.js";

const $ = (id) => document.getElementById(id);
const PALETTE = [[0, 114, 178], [240, 228, 66], [213, 94, 0], [86, 180, 233], [0, 158, 115], [230, 159, 0], [204, 121, 167]];
const HEAT = [[20, 20, 60], [0, 114, 178], [230, 159, 0], [250, 240, 130]];
const SIDE = 960; // of the drawn picture's longer side, in pixels
const SHOWN = ["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/avif"];

const VISIBLE = /[^\s\p{Cc}\p{Cf}]/u; // what a sentence has at least one of, as in Python

let picture = null; // {blob, name, bitmap}
let found = []; // {text, score, probability, words, big: Uint8ClampedArray at the drawn size, on}
let size = { width: 0, height: 0 }; // as drawn
let word = null; // the word whose map is shown
let job = null; // AbortController of the running job
let drawing = 0;
const context = $("view").getContext("2d", { willReadFrequently: true });

// ---- pictures in

async function take(blob, name) {
  say("error", "");
  let bitmap;
  try {
    if (blob.type && !SHOWN.includes(blob.type)) throw new TypeError();
    bitmap = await createImageBitmap(blob);
  } catch {
    say("error", `${name} is not a picture that can be shown here: choose a JPEG, PNG, WebP, GIF or BMP file.`);
    return false;
  }
  job?.abort();
  picture = { blob, name, bitmap };
  forget();
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  size = { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) };
  Object.assign($("view"), size);
  $("view").hidden = false;
  $("stage").classList.remove("empty");
  $("name").textContent = `${name}, ${bitmap.width} × ${bitmap.height}`;
  draw();
  say("status", `Picture ${name} is shown.`);
  return true;
}

function forget() {
  found = [];
  word = null;
  $("results").hidden = true;
  document.body.classList.remove("found");
  $("legend").replaceChildren();
}

$("file").addEventListener("change", async () => {
  const [file] = $("file").files;
  if (file) await take(file, file.name);
  $("file").value = ""; // the same file may be chosen again
});

let over = 0;
document.addEventListener("dragenter", (event) => { event.preventDefault(); over++; $("stage").classList.add("over"); });
document.addEventListener("dragleave", () => { if (--over <= 0) $("stage").classList.remove("over"); });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  over = 0;
  $("stage").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) take(file, file.name);
  else say("error", "What was dropped is no file: save the picture first, then drop it here.");
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) take(file, "The pasted picture");
});

async function showExamples() {
  const answer = await fetch(new URL("examples/examples.json", import.meta.url));
  for (const [nth, { file, sentences }] of (await answer.json()).examples.entries()) {
    const address = new URL(`examples/${file}`, import.meta.url);
    const image = Object.assign(new Image(), { src: address, alt: `Example ${nth + 1}: ${sentences.join(", ")}`, width: 112, height: 112 });
    const button = element("button", { type: "button" }, image);
    button.addEventListener("click", async () => {
      if (!(await take(await (await fetch(address)).blob(), `Example ${nth + 1}`))) return;
      $("sentences").value = sentences.join("\n");
      find();
    });
    $("examples").querySelector("ul").append(element("li", {}, button));
  }
  $("examples").hidden = false;
}

// ---- the job

async function find() {
  const sentences = $("sentences").value.split("\n").map((line) => line.trim()).filter((line) => VISIBLE.test(line));
  say("error", "");
  if (!picture) return complain("Choose a picture first, or click an example.", $("file"));
  if (!sentences.length) return complain("Type at least one sentence: what to look for in the picture.", $("sentences"));
  job?.abort();
  const own = (job = new AbortController());
  forget();
  draw();
  busy(true);
  try {
    const answer = await backend.segment(picture.blob, sentences, (fraction, words) => own === job && progress(fraction, words), own.signal);
    if (own !== job) return;
    found = answer.results.map((result) => ({ ...result, big: enlarge(result.probability), on: true }));
    showLegend();
    draw();
    say("status", found.map((one, nth) => `${nth + 1}: ${one.text}, ${measure(one).words}`).join(". "));
  } catch (error) {
    if (own === job && error.name !== "AbortError") say("error", error.message);
  } finally {
    if (own === job) { job = null; busy(false); }
  }
}

function complain(words, field) {
  say("error", words);
  field.focus();
}

function busy(yes) {
  $("find").disabled = yes;
  $("stop").hidden = $("progress").hidden = !yes;
  $("picture").setAttribute("aria-busy", yes);
  if (yes) $("bar").removeAttribute("value");
}

function progress(fraction, words) {
  if (fraction > 0) $("bar").value = fraction;
  $("words").textContent = words;
  say("status", words);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); find(); });
$("sentences").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); find(); } });
$("stop").addEventListener("click", () => { job?.abort(); job = null; busy(false); say("status", "Stopped."); $("find").focus(); });

// ---- what was found

function showLegend() {
  $("legend").replaceChildren(...found.map((one, nth) => {
    const show = element("input", { type: "checkbox", checked: true });
    show.addEventListener("change", () => { one.on = show.checked; item.classList.toggle("off", !one.on); draw(); });
    const save = element("button", { type: "button", className: "link" }, "Mask (PNG)");
    save.setAttribute("aria-label", `Download mask ${nth + 1} (PNG)`);
    save.addEventListener("click", () => saveMask(one, nth));
    one.shown = element("span", {});
    const item = element("li", {}, swatch(nth), sentence(one),
      element("div", { className: "about" }, one.shown, element("label", {}, show, "Show", element("span", { className: "unseen" }, ` mask ${nth + 1}`)), save));
    return item;
  }));
  $("results").hidden = false;
  document.body.classList.add("found");
  report();
}

function sentence(one) {
  const line = element("p", { className: "sentence" });
  let at = 0;
  for (const part of one.words) {
    line.append(one.text.slice(at, part.start));
    at = part.end;
    if (!part.map) { line.append(part.text); continue; }
    const button = element("button", { type: "button", className: "word" }, one.text.slice(part.start, part.end));
    button.setAttribute("aria-pressed", "false");
    const show = () => { word = part; draw(); };
    const hide = () => { if (word === part && button.getAttribute("aria-pressed") === "false") { word = pinned()?.part ?? null; draw(); } };
    button.part = part;
    button.addEventListener("mouseenter", show);
    button.addEventListener("focus", () => { show(); say("status", `Map of the word ${part.text}: strongest at the ${place(part.map)}.`); });
    button.addEventListener("mouseleave", hide);
    button.addEventListener("blur", hide);
    button.addEventListener("click", () => {
      const press = button.getAttribute("aria-pressed") === "false";
      pinned()?.setAttribute("aria-pressed", "false");
      button.setAttribute("aria-pressed", press);
      word = press ? part : null;
      draw();
    });
    line.append(button);
  }
  line.append(one.text.slice(at));
  return line;
}

const pinned = () => $("legend").querySelector("[aria-pressed=true]");

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !word) return;
  pinned()?.setAttribute("aria-pressed", "false");
  word = null;
  draw();
});

function report() {
  for (const one of found) {
    const { score, words } = measure(one);
    const meter = element("i", {});
    meter.style.width = `${100 * score}%`;
    const bar = element("span", { className: "meter" }, meter);
    bar.setAttribute("aria-hidden", "true");
    one.shown.replaceChildren(bar, words);
  }
}

/** Score (mean probability over the mask), share of the picture, and both in words. */
function measure(one) {
  const { data } = one.probability, limit = 255 * threshold();
  let sum = 0, count = 0;
  for (const value of data) if (value > limit) { sum += value; count++; }
  const score = count ? (threshold() === 0.5 && one.score ? one.score : sum / count / 255) : 0;
  const share = (100 * count) / data.length;
  return { score, words: count ? `score ${score.toFixed(2)}, ${share.toFixed(1)} % of the picture` : "nothing above the threshold" };
}

const threshold = () => Number($("threshold").value);

$("threshold").addEventListener("input", () => {
  $("threshold-shown").textContent = threshold().toFixed(2);
  report();
  draw();
});
$("threshold").addEventListener("change", () => say("status", found.map((one, nth) => `${nth + 1}: ${measure(one).words}`).join(". ")));

// ---- drawing

/** Draw once per frame, however often it is asked for. */
function draw() {
  cancelAnimationFrame(drawing);
  drawing = requestAnimationFrame(paint);
}

function paint() {
  if (!picture) return;
  context.clearRect(0, 0, size.width, size.height);
  context.drawImage(picture.bitmap, 0, 0, size.width, size.height);
  const shown = found.filter((one) => one.on);
  if (word) paintHeat(word.map);
  else if (shown.length) paintMasks();
  $("view").setAttribute("aria-label", word
    ? `Picture with the map of the word ${word.text}`
    : `Picture ${picture.name}${shown.length ? ` with ${shown.length === 1 ? "1 mask" : `${shown.length} masks`}` : ""}`);
}

function paintMasks() {
  const { width, height } = size, layer = new ImageData(width, height), out = layer.data, limit = 255 * threshold();
  const line = Math.max(2, Math.round(SIDE / 300)), labels = [];
  for (const [nth, { big, on }] of found.entries()) {
    if (!on) continue;
    const [r, g, b] = PALETTE[nth % PALETTE.length];
    let sumX = 0, sumY = 0, count = 0;
    const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && big[y * width + x] > limit;
    for (let y = 0, at = 0; y < height; y++) {
      for (let x = 0; x < width; x++, at++) {
        if (big[at] <= limit) continue;
        sumX += x; sumY += y; count++;
        const edge = !inside(x - line, y) || !inside(x + line, y) || !inside(x, y - line) || !inside(x, y + line);
        const rim = edge && (!inside(x - 1, y) || !inside(x + 1, y) || !inside(x, y - 1) || !inside(x, y + 1));
        const alpha = edge ? 255 : pattern(nth, x, y) ? 165 : 75;
        const to = 4 * at;
        out[to] = rim ? 0 : r; out[to + 1] = rim ? 0 : g; out[to + 2] = rim ? 0 : b; out[to + 3] = rim ? 200 : alpha;
      }
    }
    if (count) labels.push([nth, ...nearest(big, limit, sumX / count, sumY / count)]);
  }
  context.drawImage(canvasOf(layer), 0, 0);
  const radius = (13 * width) / ($("view").clientWidth || width); // as large on a phone
  const within = (at, side) => Math.min(Math.max(at, radius + 2), side - radius - 2);
  for (const [nth, x, y] of labels) label(context, nth, within(x, width), within(y, height), radius);
}

/** The pixel of the mask that is nearest to its middle: the middle of a ring is not in it. */
function nearest(big, limit, middleX, middleY) {
  let best = Infinity, at = [0, 0];
  for (let y = 0; y < size.height; y += 4)
    for (let x = 0; x < size.width; x += 4) {
      const distance = (x - middleX) ** 2 + (y - middleY) ** 2;
      if (distance < best && big[y * size.width + x] > limit) { best = distance; at = [x, y]; }
    }
  return at;
}

function label(context, nth, x, y, radius) {
  const [r, g, b] = PALETTE[nth % PALETTE.length], light = 0.3 * r + 0.6 * g + 0.1 * b > 130;
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fillStyle = `rgb(${r} ${g} ${b})`;
  context.fill();
  context.lineWidth = radius / 7;
  context.strokeStyle = light ? "#111" : "#fff";
  context.stroke();
  context.fillStyle = light ? "#111" : "#fff";
  context.font = `700 ${radius * 1.15}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(nth + 1, x, y + radius * 0.06);
}

/** Whether a pixel lies on the lines of the nth pattern. */
function pattern(nth, x, y, step = 14) {
  switch (nth % 7) {
    case 0: return true;
    case 1: return (x + y) % step < step / 2.5;
    case 2: return (x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < (step / 3.2) ** 2;
    case 3: return y % step < step / 2.5;
    case 4: return (x - y + 7000) % step < step / 2.5;
    case 5: return x % step < step / 2.5;
    default: return x % step < step / 4 || y % step < step / 4;
  }
}

function swatch(nth) {
  const side = 72, canvas = Object.assign(document.createElement("canvas"), { width: side, height: side, className: "swatch" });
  const context = canvas.getContext("2d"), layer = new ImageData(side, side), [r, g, b] = PALETTE[nth % PALETTE.length];
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++) layer.data.set([r, g, b, Math.min(x, y, side - 1 - x, side - 1 - y) < 5 ? 255 : pattern(nth, x, y) ? 165 : 60], 4 * (y * side + x));
  context.putImageData(layer, 0, 0);
  label(context, nth, side / 2, side / 2, 20);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Mask ${nth + 1}`);
  return canvas;
}

function paintHeat(map) {
  const big = enlarge(map), layer = context.getImageData(0, 0, size.width, size.height), { data } = layer;
  for (let at = 0, to = 0; at < big.length; at++, to += 4) {
    const level = (big[at] / 255) * (HEAT.length - 1), low = Math.min(Math.floor(level), HEAT.length - 2);
    const grey = (data[to] + data[to + 1] + data[to + 2]) / 3;
    for (let c = 0; c < 3; c++) data[to + c] = 0.35 * grey + 0.65 * (HEAT[low][c] + (level - low) * (HEAT[low + 1][c] - HEAT[low][c]));
  }
  context.putImageData(layer, 0, 0);
}

/** A map enlarged smoothly to a size, as one byte per pixel. */
function enlarge(map, { width, height } = size) {
  const layer = new ImageData(map.width, map.height);
  for (let at = 0; at < map.data.length; at++) layer.data.set([map.data[at], map.data[at], map.data[at], 255], 4 * at);
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(canvasOf(layer), 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  return Uint8ClampedArray.from({ length: width * height }, (_, at) => data[4 * at]);
}

function canvasOf(layer) {
  const canvas = Object.assign(document.createElement("canvas"), { width: layer.width, height: layer.height });
  canvas.getContext("2d").putImageData(layer, 0, 0);
  return canvas;
}

/** In words, where a map is highest. */
function place({ width, height, data }) {
  const at = data.indexOf(data.reduce((most, value) => Math.max(most, value), 0));
  const down = ["top", "middle", "bottom"][Math.floor((3 * Math.floor(at / width)) / height)];
  const along = ["left", "middle", "right"][Math.floor((3 * (at % width)) / width)];
  return down === along ? "middle" : `${down} ${along}`;
}

// ---- downloads

const stem = () => picture.name.replace(/\.[^.]*$/, "").replace(/[^\w-]+/g, "-").toLowerCase() || "picture";

function download(blob, name) {
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say("status", `${name} is saved.`);
}

/** The mask at the picture's own size, one byte per pixel: 255 or 0. */
function ownMask(one) {
  const limit = 255 * threshold();
  return enlarge(one.probability, picture.bitmap).map((value) => (value > limit ? 255 : 0));
}

function saveMask(one, nth) {
  const { width, height } = picture.bitmap, layer = new ImageData(width, height);
  for (const [at, value] of ownMask(one).entries()) layer.data.set([value, value, value, 255], 4 * at);
  canvasOf(layer).toBlob((blob) => download(blob, `${stem()}_${nth + 1}_mask.png`));
}

$("save-picture").addEventListener("click", () => {
  word = null;
  paint();
  $("view").toBlob((blob) => download(blob, `${stem()}_masks.png`));
});

$("save-rle").addEventListener("click", () => {
  const { width, height } = picture.bitmap;
  const annotations = found.map((one) => {
    const mask = ownMask(one), counts = [];
    let left = width, top = height, right = -1, bottom = -1, area = 0, last = 0, run = 0;
    for (let x = 0; x < width; x++)
      for (let y = 0; y < height; y++) { // COCO counts down the columns, the first run is outside
        const value = mask[y * width + x];
        if (value !== last) { counts.push(run); run = 0; last = value; }
        run++;
        if (!value) continue;
        area++;
        left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
      }
    counts.push(run);
    const box = area ? [left, top, right + 1, bottom + 1] : null; // [x0, y0, x1, y1], half-open
    return { text: one.text, score: Number(measure(one).score.toFixed(4)), area, box, segmentation: { size: [height, width], counts } };
  });
  const content = { image: { file_name: picture.name, width, height }, threshold: threshold(), annotations };
  download(new Blob([JSON.stringify(content)], { type: "application/json" }), `${stem()}_masks.json`);
});

// ---- small things

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(id, words) {
  $(id).textContent = words;
}

// ---- begin

try {
  busy(true);
  $("stop").hidden = true;
  const about = await backend.load(progress);
  const scenes = !about?.model || about.model === "scenes";
  $("note").hidden = !scenes;
  if (scenes) await showExamples();
  say("status", "Ready.");
} catch (error) {
  say("error", error.message);
} finally {
  busy(false);
}
