// Masks from probability maps: scores at any threshold, positions in words, COCO's run lengths.

import { enlarge } from "./drawing.js";

/** Score of a result (mean probability over the mask), and score and area in words. */
export function measure({ probability, score }, threshold) {
  const limit = 255 * threshold;
  let sum = 0, count = 0;
  for (const value of probability.data) if (value > limit) { sum += value; count++; }
  if (!count) return { score: 0, words: "nothing above the threshold" };
  const mean = threshold === 0.5 && score ? score : sum / count / 255; // the model's own score is exact
  const percent = (100 * count) / probability.data.length;
  return { score: mean, words: `score ${mean.toFixed(2)}, ${percent.toFixed(1)} % of the image` };
}

/** The mask of a result at a size, one byte per pixel: 255 or 0. */
export function maskOf({ probability }, threshold, size) {
  return enlarge(probability, size).map((value) => (value > 255 * threshold ? 255 : 0));
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
