// Masks from the HTTP API of `cmmasksd serve`. A backend is a file with these two functions:
//
//   load(onProgress)                              returns {model, minScore} once the model is ready: its name, and the
//                                                 presence below which a sentence is not found, before the user moves it
//   segment(blob, sentences, onProgress, signal)  returns {width, height, results: [{text, score, presence, probability,
//                                                 words}]}
//
// probability is {width, height, data: Uint8Array}, 0 to 255 over the whole image. words are spans of the sentence,
// [{text, start, end, map}], map like probability or null. onProgress gets (fraction, words). Errors are one line.

import { progressOf } from "./sentences.js";

const API = new URL("../v1/", import.meta.url);
const BATCH = 8; // sentences per request; a long job takes several, so that progress can be shown

export async function load(onProgress) {
  onProgress(0, "Asking the server");
  const health = await call("health", {});
  onProgress(1, "Ready");
  return { model: health.model, minScore: health.min_score };
}

export async function segment(blob, sentences, onProgress, signal) {
  const responses = [];
  for (let start = 0; start < sentences.length; start += BATCH) {
    const fraction = start / sentences.length;
    onProgress(fraction, progressOf(start, sentences.length));
    const form = new FormData();
    form.append("image", blob, "image");
    for (const sentence of sentences.slice(start, start + BATCH)) form.append("sentences", sentence);
    for (const want of ["probability", "words"]) form.append("want", want);
    responses.push(await call("segment", { method: "POST", body: form, signal }, (words) => onProgress(fraction, words)));
  }
  onProgress(1, "Done");
  const { width, height } = responses[0];
  const results = responses.flatMap((response) => response.results).map(({ text, score, presence, probability, words }) => ({
    text,
    score,
    presence,
    probability: decoded(probability),
    words: words.map((word) => ({ ...word, map: decoded(word.map) })),
  }));
  return { width, height, results };
}

function decoded(map) {
  return map && { ...map, data: Uint8Array.from(atob(map.data), (character) => character.charCodeAt(0)) };
}

async function call(path, request, onWait = () => {}) {
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(new URL(path, API), request);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not respond. Is it still running?");
    }
    if (response.ok) return response.json();
    if (response.status === 429 && attempt < 20) {
      onWait("The server is busy; waiting");
      await pause(1000 * (Number(response.headers.get("Retry-After")) || 1), request.signal);
      continue;
    }
    if (response.status === 401) throw new Error("This server requires a key: reload the page and enter the key as the password.");
    const body = await response.json().catch(() => null);
    throw new Error(asSentence(body?.error?.message ?? `the server refused with status ${response.status}`));
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(new DOMException("stopped", "AbortError")); });
  });
}

const asSentence = (words) => words[0].toUpperCase() + words.slice(1).replace(/\.?$/, ".");
