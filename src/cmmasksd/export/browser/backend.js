// Masks from the exported model, in the browser (onnxruntime-web, one thread of WebAssembly). Nothing leaves the page.
// Takes the place of serving/page/backend.js, which documents the two functions.

import * as ort from "./ort/ort.wasm.min.mjs";
import { fitted, place, pixelValues, presence } from "./pixels.js";
import { isBlank, progressOf } from "./sentences.js";
import { makeTokenizer } from "./tokenizer.js";

const MAP_SIDE = 512, WORD_SIDE = 64; // maximum longer side of a probability map and of a word map, in pixels
const MAX_PIXELS = 64_000_000, MAX_SIDE = 32_768, MAX_RATIO = 100; // as in Python
const GRAPHS = ["image", "text", "decoder", "restore"];

ort.env.wasm.numThreads = 1; // more threads need headers that a plain file server does not send
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

let model = null; // promise of {settings, tokenize, sessions}

export async function load(onProgress = () => {}) {
  model ??= read(onProgress).catch((error) => { model = null; throw error; });
  const { settings } = await model;
  onProgress(1, "Ready");
  return { model: settings.source, minScore: 0 };
}

async function read(onProgress) {
  const settings = JSON.parse(new TextDecoder().decode(await file("export.json")));
  const tokenize = makeTokenizer(JSON.parse(new TextDecoder().decode(await file("tokenizer.json"))), settings);
  const sessions = {};
  for (const [index, graph] of GRAPHS.entries()) {
    const bytes = await file(`${graph}.onnx`, (share) => onProgress((index + 0.9 * share) / GRAPHS.length, "Loading the model"));
    try {
      sessions[graph] = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    } catch (error) {
      throw new Error(`This browser cannot run the model (${error.message.split("\n")[0]}).`);
    }
  }
  return { settings, tokenize, sessions };
}

async function file(name, onProgress = () => {}) {
  const response = await fetch(new URL(`./model/${name}`, import.meta.url)).catch(() => null);
  if (!response?.ok) throw new Error(`Cannot load ${name} of the model: check the site and the network.`);
  const total = Number(response.headers.get("Content-Length")), parts = [];
  let length = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    length += value.length;
    if (total) onProgress(Math.min(1, length / total));
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

export async function segment(blob, sentences, onProgress = () => {}, signal = undefined) {
  await load(onProgress);
  const { settings, tokenize, sessions } = await model;
  if (sentences.some(isBlank)) throw new Error("An empty sentence names no object: give at least one word.");
  onProgress(0, "Reading the image");
  const { width, height, data } = await decode(blob);
  const placement = place(height, width, settings), [h, w] = placement.canvas;
  const input = new ort.Tensor("float32", pixelValues(data, placement, settings), [1, 3, h, w]);
  const image = await sessions.image.run({ pixel_values: input });
  const mapSize = fitted(placement.original, MAP_SIDE), wordSize = fitted(placement.original, WORD_SIDE);
  const sides = { canvas: integers(placement.canvas), content: integers(placement.content) };
  const restore = (logits, size) => sessions.restore.run({ logits, original: integers(size), ...sides });
  const results = [];
  for (const [index, text] of sentences.entries()) {
    onProgress((index + 1) / (sentences.length + 1), progressOf(index, sentences.length));
    await new Promise((next) => setTimeout(next)); // lets the page draw and react to Stop
    signal?.throwIfAborted();
    const { ids, words } = tokenize(text), L = ids.length;
    const sentence = await sessions.text.run({ input_ids: integers(ids, 1), attention_mask: integers(ids.map(() => 1), 1) });
    const word_mask = new ort.Tensor("bool", Uint8Array.from(ids, (_, at) => at > 0 && at < L - 1), [1, L]);
    const features = { ...image, ...sentence, word_mask };
    const { logits } = await sessions.decoder.run(Object.fromEntries(sessions.decoder.inputNames.map((name) => [name, features[name]])));
    const probability = (await restore(logits, mapSize)).probability.data;
    const inMask = probability.filter((value) => value > 0.5);
    const maps = [];
    for (const { pieces, ...word } of words) {
      const { restored } = await restore(correlation(image.joint ?? image.patches, sentence.words, pieces), wordSize);
      maps.push({ ...word, map: stretched(restored.data, wordSize) });
    }
    results.push({
      text,
      score: inMask.length ? inMask.reduce((a, b) => a + b) / inMask.length : 0,
      presence: presence(logits.data),
      probability: bytes(probability, mapSize),
      words: maps,
    });
  }
  onProgress(1, "Done");
  return { width, height, results };
}

const integers = (values, ...dims) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [...dims, values.length]);

/** Pixels of an image file: EXIF orientation applied, transparency over white, no colour profile, as in Python. */
async function decode(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  } catch {
    throw new Error("This file is not an image that the browser can read.");
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`The image has more than ${MAX_PIXELS / 1e6} megapixels: make it smaller first.`);
  if (Math.max(width, height) > Math.min(MAX_SIDE, MAX_RATIO * Math.min(width, height)))
    throw new Error(`The image of ${width} × ${height} is too long or too narrow: crop it first.`);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true, alpha: false });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/** Cosine of every patch with a word (mean over its pieces), (1, h, w). */
function correlation(patches, words, pieces) {
  const [, h, w, D] = patches.dims, values = new Float32Array(h * w);
  const norm = (data, at) => Math.hypot(...data.subarray(at, at + D)) || 1;
  for (const piece of pieces) {
    const wordNorm = norm(words.data, piece * D) * pieces.length;
    for (let n = 0; n < h * w; n++) {
      let sum = 0;
      for (let d = 0; d < D; d++) sum += patches.data[n * D + d] * words.data[piece * D + d];
      values[n] += sum / (wordNorm * norm(patches.data, n * D));
    }
  }
  return new ort.Tensor("float32", values, [1, h, w]);
}

/** A word's map scaled from its minimum to its maximum; null where all values are equal. */
function stretched(map, size) {
  const low = map.reduce((a, b) => Math.min(a, b)), high = map.reduce((a, b) => Math.max(a, b));
  return high > low ? bytes(map.map((value) => (value - low) / (high - low)), size) : null;
}

const bytes = (values, [height, width]) => ({ width, height, data: Uint8Array.from(values, (value) => Math.round(255 * value)) });
