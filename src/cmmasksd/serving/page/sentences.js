// Sentences in words: what the page and every backend need.

/** Whether a sentence has nothing but white space and invisible characters, as in Python. */
export const isBlank = (sentence) => !/[^\s\p{Cc}\p{Cf}]/u.test(sentence);

/** Progress of a job in words. */
export function progressOf(done, total) {
  const count = total === 1 ? "1 sentence" : `${total} sentences`;
  return done ? `${done} of ${count} done` : `Looking for ${count}`;
}
