// Preprocessing of pixels, equal to Python's (inference/bicubic.py) pixel by pixel. A canvas scales
// differently from what the model was trained on. And the presence score of the logits.

/** Placement of an image on the model's canvas: {original, canvas, content: [top, left, height, width]}. */
export function place(height, width, { size: canvas, resize }) {
  const original = [height, width];
  if (resize === "warp") return { original, canvas, content: [0, 0, ...canvas] };
  const scale = Math.min(canvas[0] / height, canvas[1] / width);
  const [h, w] = original.map((side, axis) => Math.min(canvas[axis], Math.max(1, roundToEven(side * scale))));
  return { original, canvas, content: [(canvas[0] - h) >> 1, (canvas[1] - w) >> 1, h, w] };
}

/** RGBA bytes of an image to the model's input: Float32Array (3, h, w). */
export function pixelValues(rgba, placement, { mean, std }) {
  const [H, W] = placement.original, [height, width] = placement.canvas, [top, left, h, w] = placement.content;
  const small = resizeBicubic(rgba, H, W, h, w), plane = height * width, values = new Float32Array(3 * plane);
  for (let c = 0; c < 3; c++) {
    const shift = Math.fround(Math.fround(mean[c]) * 255), scale = Math.fround(Math.fround(std[c]) * 255);
    values.fill((roundToEven(255 * mean[c]) - shift) / scale, c * plane, (c + 1) * plane);
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++)
        values[c * plane + (top + y) * width + left + x] = Math.fround(small[4 * (y * w + x) + c] - shift) / scale;
  }
  return values;
}

/** Antialiased bicubic on bytes with four channels, in the integers that torch computes with. */
export function resizeBicubic(pixels, H, W, height, width) {
  if (H * width > 4 * Math.max(H * W, height * width)) { // long and narrow: see columns_first in model/placement.py
    pixels = resizeLines(pixels, W, H, height, 4, 4 * W, 4, 4 * W);
    H = height;
  }
  if (W !== width) pixels = resizeLines(pixels, H, W, width, 4 * W, 4, 4 * width, 4);
  if (H !== height) pixels = resizeLines(pixels, width, H, height, 4, 4 * width, 4, 4 * width);
  return pixels;
}

function resizeLines(pixels, lines, source, target, inLine, inStep, outLine, outStep) {
  const { first, weights, precision } = bicubicWeights(source, target), half = 1 << (precision - 1);
  const out = new Uint8ClampedArray(4 * lines * target);
  for (let line = 0; line < lines; line++)
    for (let at = 0; at < target; at++) {
      const taps = weights[at];
      let from = line * inLine + first[at] * inStep, r = half, g = half, b = half;
      for (let tap = 0; tap < taps.length; tap++, from += inStep) {
        r += taps[tap] * pixels[from];
        g += taps[tap] * pixels[from + 1];
        b += taps[tap] * pixels[from + 2];
      }
      const to = line * outLine + at * outStep;
      out[to] = r >> precision;
      out[to + 1] = g >> precision;
      out[to + 2] = b >> precision;
    }
  return out;
}

function bicubicWeights(source, target) {
  const scale = source / target, shrink = Math.max(scale, 1), first = [], rows = [];
  let largest = 0;
  for (let at = 0; at < target; at++) {
    const centre = scale * (at + 0.5);
    const start = Math.max(Math.trunc(centre - 2 * shrink + 0.5), 0), end = Math.min(Math.trunc(centre + 2 * shrink + 0.5), source);
    const row = [];
    for (let tap = start; tap < end; tap++) row.push(cubic(Math.abs((tap - centre + 0.5) / shrink)));
    const sum = row.reduce((a, b) => a + b);
    first.push(start);
    rows.push(row.map((weight) => weight / sum));
    largest = Math.max(largest, ...rows[at]);
  }
  let precision = 0;
  while (precision < 22 && Math.trunc(0.5 + largest * 2 ** (precision + 1)) < 1 << 15) precision++;
  const weights = rows.map((row) => Int32Array.from(row, (weight) => Math.trunc(weight * 2 ** precision + Math.sign(weight) * 0.5)));
  return { first, weights, precision };
}

const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((x - 5) * x + 8) * x * -0.5 + 2 : 0);

/** How sure the model is that the image holds what a sentence names, from the logits of the whole canvas; see model/presence.py. */
export function presence(logits) {
  const top = Float32Array.from(logits).sort().slice(-Math.max(1, Math.floor(logits.length / 256)));
  return top.reduce((sum, logit) => sum + 1 / (1 + Math.exp(-logit)), 0) / top.length;
}

/** A size shrunk until its longer side fits. */
export function fitted([height, width], side) {
  const scale = Math.min(1, side / Math.max(height, width));
  return [Math.max(1, roundToEven(height * scale)), Math.max(1, roundToEven(width * scale))];
}

/** As Python rounds. */
function roundToEven(value) {
  const down = Math.floor(value);
  return value - down === 0.5 ? down + (down % 2) : Math.round(value);
}
