// Where masks come from: here, the HTTP API of `cmmasksd serve`. Another file with the same two functions makes the
// page run on something else.
//
//   load(onProgress)                              ready to use; gives {model}: its name
//   segment(blob, sentences, onProgress, signal)  gives {width, height, results: [{text, score, probability, words}]}
//
// probability is {width, height, data: Uint8Array}, 0 to 255 over the whole picture; words are spans of the sentence,
// [{text, start, end, map}], map like probability or null. Errors say what is wrong in one line.

const API = new URL("../v1/", import.meta.url);
const TOGETHER = 8; // sentences of one request: several requests show how far a long job is

export async function load(onProgress) {
  onProgress(0, "Asking the server");
  const health = await call("health", {});
  onProgress(1, "Ready");
  return { model: health.model };
}

export async function segment(blob, sentences, onProgress, signal) {
  const answers = [];
  for (let start = 0; start < sentences.length; start += TOGETHER) {
    const part = sentences.slice(start, start + TOGETHER);
    const count = sentences.length === 1 ? "1 sentence" : `${sentences.length} sentences`;
    onProgress(start / sentences.length, start ? `${start} of ${count} done` : `Looking for ${count}`);
    const form = new FormData();
    form.append("image", blob, "picture");
    for (const sentence of part) form.append("sentences", sentence);
    for (const want of ["probability", "words"]) form.append("want", want);
    answers.push(await call("segment", { method: "POST", body: form, signal }, (words) => onProgress(start / sentences.length, words)));
  }
  onProgress(1, "Done");
  const { width, height } = answers[0];
  const results = answers.flatMap((answer) => answer.results).map((found) => ({
    text: found.text,
    score: found.score,
    probability: bytes(found.probability),
    words: found.words.map((word) => ({ ...word, map: bytes(word.map) })),
  }));
  return { width, height, results };
}

function bytes(map) {
  return map && { ...map, data: Uint8Array.from(atob(map.data), (character) => character.charCodeAt(0)) };
}

async function call(path, request, say = () => {}) {
  for (let attempt = 0; ; attempt++) {
    let answer;
    try {
      answer = await fetch(new URL(path, API), request);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (answer.ok) return answer.json();
    if (answer.status === 429 && attempt < 20) {
      say("The server is busy; waiting for a free place");
      await pause(1000 * (Number(answer.headers.get("Retry-After")) || 1), request.signal);
      continue;
    }
    if (answer.status === 401) throw new Error("This server asks for a key: load the page again and give the key as the password.");
    const said = await answer.json().catch(() => null);
    throw new Error(sentence(said?.error?.message ?? `the server refused with status ${answer.status}`));
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(new DOMException("stopped", "AbortError")); });
  });
}

const sentence = (words) => words[0].toUpperCase() + words.slice(1).replace(/\.?$/, ".");
