// CLIP's byte-level BPE from a tokenizer.json, equal to the tokenizers library's for every sentence.
//
// `cmmasksd export --format web` refuses other tokenizers, so the steps are fixed: NFC, white space to one space, lower
// case; then words, whose last character gets "</w>".

const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const PARTS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+/gu;
const LETTERS = byteLetters();

/** `settings` is export.json. Returns a function: sentence -> {ids, words: [{text, start, end, pieces: [index in ids]}]}. */
export function makeTokenizer(tokenizer, settings) {
  const vocabulary = new Map(Object.entries(tokenizer.model.vocab));
  const ranks = new Map(tokenizer.model.merges.map((pair, rank) => [typeof pair === "string" ? pair : pair.join(" "), rank]));
  const unknown = vocabulary.get(tokenizer.model.unk_token);

  function pieces(word) {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => LETTERS[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = ranks.get(`${parts[i]} ${parts[i + 1]}`);
        if (rank < best) { best = rank; at = i; }
      }
      if (at < 0) return parts.map((part) => vocabulary.get(part) ?? unknown);
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
  }

  return (sentence) => {
    const { text, origin } = normalize(sentence);
    const ids = [settings.start_token], words = [];
    for (const outer of text.matchAll(WORDS))
      for (const inner of outer[0].matchAll(PARTS)) {
        const room = settings.max_tokens - 1 - ids.length;
        if (room <= 0) break;
        const start = outer.index + inner.index, wordIds = pieces(inner[0]).slice(0, room);
        if (origin) {
          const [from, to] = [origin[start][0], origin[start + inner[0].length - 1][1]];
          words.push({ text: sentence.slice(from, to), start: from, end: to, pieces: wordIds.map((_, index) => ids.length + index) });
        }
        ids.push(...wordIds);
      }
    ids.push(settings.end_token);
    return { ids, words };
  };
}

/** The normalised text, and for each of its code units the span of the sentence that it comes from. */
function normalize(sentence) {
  const lower = (part) => Array.from(part, (character) => character.toLowerCase()).join(""); // no exception for a final sigma
  const read = (part) => lower(part.normalize("NFC").replace(/\p{White_Space}+/gu, " "));
  const text = read(sentence), origin = [];
  let parts = "";
  for (const { 0: part, index } of sentence.matchAll(/\p{White_Space}+|[\u1100-\u1112][\u1161-\u1175]?[\u11a8-\u11c2]?|.\p{M}*/gsu)) {
    const normal = read(part);
    parts += normal;
    for (let i = 0; i < normal.length; i++) origin.push([index, index + part.length]);
  }
  return { text, origin: parts === text ? origin : null }; // null: characters that combine in rarer ways
}

/** GPT-2's letter for every byte. */
function byteLetters() {
  const letters = [];
  for (let byte = 0, more = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    letters.push(String.fromCharCode(printable ? byte : 256 + more++));
  }
  return letters;
}
