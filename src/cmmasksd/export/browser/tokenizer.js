// CLIP's byte-level BPE and BERT's lower-casing WordPiece from a tokenizer.json, equal to the tokenizers library's.
//
// `cmmasksd export --format web` refuses other tokenizers and other settings of these, so the steps are fixed.

/** `settings` is export.json. Returns a function: sentence -> {ids, words: [{text, start, end, pieces: [index in ids]}]}. */
export function makeTokenizer({ model }, settings) {
  const wordsOf = model.type === "BPE" ? bytePairs(model) : wordPieces(model);
  return (sentence) => {
    const ids = [settings.start_token], words = [];
    for (const { start, end, pieces } of wordsOf(sentence)) {
      const kept = pieces.slice(0, settings.max_tokens - 1 - ids.length);
      if (!kept.length) break;
      if (end) words.push({ text: sentence.slice(start, end), start, end, pieces: kept.map((_, index) => ids.length + index) });
      ids.push(...kept);
    }
    ids.push(settings.end_token);
    return { ids, words };
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// CLIP: NFC, white space to one space, lower case; then words, whose last character gets "</w>"

const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+/gu;
const PARTS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+/gu;
const LETTERS = byteLetters();

/** Returns a function: sentence -> its words, {start, end, pieces: [id]}; no start and end where they are unknown. */
function bytePairs(model) {
  const vocabulary = new Map(Object.entries(model.vocab));
  const ranks = new Map(model.merges.map((pair, rank) => [typeof pair === "string" ? pair : pair.join(" "), rank]));
  const unknown = vocabulary.get(model.unk_token);

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

  return function* (sentence) {
    const { text, origin } = normalize(sentence);
    for (const outer of text.matchAll(WORDS))
      for (const inner of outer[0].matchAll(PARTS)) {
        const start = outer.index + inner.index, last = start + inner[0].length - 1;
        yield { start: origin?.[start][0], end: origin?.[last][1], pieces: pieces(inner[0]) };
      }
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

// ---------------------------------------------------------------------------------------------------------------------
// BERT: no control characters, no accents, lower case; a punctuation mark or Chinese character is a word of its own

// Accents, format characters and punctuation younger than the library's tables (Unicode 8), to which they are letters.
const LATER = String.raw`[\u061d\u07fd\u0890-\u08e2\u09fd-\u09fe\u0a76\u0afa-\u0aff\u0b55\u0c04-\u0c3c\u0c77\u0c84\u0d00\u0d3b-\u0d3c\u0d81\u0eba\u0ece\u180f-\u1886\u1abf-\u1aeb\u1b4e-\u1b4f\u1b7d-\u1b7f\u1df6-\u1dfb\u2e43-\u2e5d\ua82c\ua8c5\ua8ff\ua9bd\u{105c9}-\u{105e4}\u{10d24}-\u{10f89}\u{11070}-\u{11074}\u{110c2}-\u{110cd}\u{111c9}\u{111cf}\u{1123e}-\u{11241}\u{1133b}\u{11383}-\u{1145e}\u{11660}-\u{1166c}\u{116b9}\u{1182f}-\u{11fff}\u{12ff1}-\u{1612f}\u{16d68}-\u{16f4f}\u{16fe2}-\u{16fe4}\u{1cf00}-\u{1cf46}\u{1e000}-\u{1e6f5}\u{1e944}-\u{1e95f}]`;
const REMOVED = new RegExp(String.raw`(?!${LATER})[\0-\x08\v\f\x0e-\x1f\x7f-\x9f\p{Cf}\p{Co}\p{Cs}\ufffd]`, "u");
const CHINESE = String.raw`\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{2a6df}\u{2a700}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}`;
const ALONE = new RegExp(String.raw`(?!${LATER})[!-/:-@[-\x60{-~\p{P}${CHINESE}]|[\u166d\u{111c9}]`, "u");
const ACCENTS = /[\p{Mn}\u1734\u{1171e}]/gu;
const KNOWN = new RegExp(`(?:(?!${LATER}).)+`, "gsu");

/** Returns a function: sentence -> its words, [{start, end, pieces: [id]}]. */
function wordPieces(model) {
  const vocabulary = new Map(Object.entries(model.vocab)), unknown = vocabulary.get(model.unk_token);

  function pieces(word) {
    const letters = Array.from(word), ids = [];
    if (letters.length > model.max_input_chars_per_word) return [unknown];
    for (let from = 0, to; from < letters.length; from = to) {
      const prefix = from ? model.continuing_subword_prefix : "";
      let id;
      for (to = letters.length; to > from; to--)
        if ((id = vocabulary.get(prefix + letters.slice(from, to).join(""))) !== undefined) break;
      if (id === undefined) return [unknown];
      ids.push(id);
    }
    return ids;
  }

  return (sentence) => {
    const words = [];
    let word = null, end = 0;
    for (const character of sentence) {
      const start = end;
      end += character.length;
      if (REMOVED.test(character)) continue;
      if (/\p{White_Space}/u.test(character)) word = null;
      else
        for (const letter of character.replace(KNOWN, (known) => known.normalize("NFD").replace(ACCENTS, "")).toLowerCase()) {
          if (!word || ALONE.test(letter)) words.push(word = { text: "", start });
          word.text += letter;
          word.end = end;
          if (ALONE.test(letter)) word = null;
        }
    }
    const ordered = (text) => text.replace(KNOWN, (known) => known.normalize("NFD")); // accents that stay, by their class
    return words.map(({ text, start, end }) => ({ start, end, pieces: pieces(ordered(text)) }));
  };
}
