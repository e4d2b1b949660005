// Masks from probability maps: scores at any threshold, positions in words, COCO's run lengths. `limits` are {threshold,
// minScore}: a pixel above the threshold is in the mask, which is empty if the presence of the sentence is below minScore.

import { enlarge } from "./drawing.js";

/** Whether the image holds what the sentence of a result names. */
export const isPresent = ({ presence }, { minScore }) => presence >= minScore;

/** Score of a result (mean probability over the mask), and score, presence and area in words. */
export function measure(result, limits) {
  const { probability, score } = result, { threshold } = limits, limit = 255 * threshold;
  const presence = `presence ${result.presence.toFixed(2)}`;
  if (!isPresent(result, limits)) return { score: 0, words: `not found, ${presence}` };
  let sum = 0, count = 0;
  for (const value of probability.data) if (value > limit) { sum += value; count++; }
  if (!count) return { score: 0, words: `nothing above the threshold, ${presence}` };
  const mean = threshold === 0.5 && score ? score : sum / count / 255; // the model's own score is exact
  const percent = (100 * count) / probability.data.length;
  return { score: mean, words: `score ${mean.toFixed(2)}, ${presence}, ${percent.toFixed(1)} % of the image` };
}

/** The mask of a result at a size, one byte per pixel: 255 or 0. */
export function maskOf(result, limits, size) {
  const limit = isPresent(result, limits) ? 255 * limits.threshold : 255;
  return enlarge(result.probability, size).map((value) => (value > limit ? 255 : 0));
}

/** Area, box ([x0, y0, x1, y1], half-open; null if empty) and COCO's uncompressed run lengths of a mask. */
export function annotate(mask, { width, height }) {
  const counts = [];
  let left = width, top = height, right = -1, bottom = -1, area = 0, last = 0, run = 0;
  for (let x = 0; x < width; x++)
    for (let y = 0; y < height; y++) { // COCO counts down the columns; the first run is outside
      const value = mask[y * width + x];
      if (value !== last) { counts.push(run); run = 0; last = value; }
      run++;
      if (!value) continue;
      area++;
      left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
    }
  counts.push(run);
  return { area, box: area ? [left, top, right + 1, bottom + 1] : null, segmentation: { size: [height, width], counts } };
}

/** Where a map is highest, in words. */
export function strongestPlace({ width, height, data }) {
  const at = data.indexOf(data.reduce((highest, value) => Math.max(highest, value), 0));
  const row = ["top", "middle", "bottom"][Math.floor((3 * Math.floor(at / width)) / height)];
  const column = ["left", "middle", "right"][Math.floor((3 * (at % width)) / width)];
  return row === column ? "middle" : `${row} ${column}`;
}
