// Drawing on canvases: masks, word maps, and the swatches of the legend.
//
// Colour is never the only cue: each mask has a number, a pattern and an outline. Colours and patterns repeat after seven
// masks.

const PALETTE = [[0, 114, 178], [240, 228, 66], [213, 94, 0], [86, 180, 233], [0, 158, 115], [230, 159, 0], [204, 121, 167]];
const HEAT = [[20, 20, 60], [0, 114, 178], [230, 159, 0], [250, 240, 130]];
const OUTLINE = 3; // width in pixels
const PERIOD = 14; // of the patterns, in pixels

export function canvasOf(layer) {
  const canvas = Object.assign(document.createElement("canvas"), { width: layer.width, height: layer.height });
  canvas.getContext("2d").putImageData(layer, 0, 0);
  return canvas;
}

/** A map {width, height, data} enlarged smoothly to another size: Uint8ClampedArray, one byte per pixel. */
export function enlarge(map, { width, height }) {
  const layer = new ImageData(map.width, map.height);
  for (let at = 0; at < map.data.length; at++) layer.data.set([map.data[at], map.data[at], map.data[at], 255], 4 * at);
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(canvasOf(layer), 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  return Uint8ClampedArray.from({ length: width * height }, (_, at) => data[4 * at]);
}

/** Draw masks and their numbers over the image: `masks` is [{index, values}], a value above `limit` is in the mask. */
export function paintMasks(context, masks, limit, radius) {
  const { width, height } = context.canvas, layer = new ImageData(width, height);
  for (const { index, values } of masks) fillMask(layer, values, limit, index);
  context.drawImage(canvasOf(layer), 0, 0);
  const within = (at, side) => Math.min(Math.max(at, radius + 2), side - radius - 2);
  for (const { index, values } of masks) {
    const centre = centreOf(values, width, height, limit);
    if (centre) label(context, index, within(centre[0], width), within(centre[1], height), radius);
  }
}

function fillMask({ width, height, data }, values, limit, index) {
  const color = PALETTE[index % PALETTE.length];
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && values[y * width + x] > limit;
  const nearEdge = (x, y, distance) =>
    !inside(x - distance, y) || !inside(x + distance, y) || !inside(x, y - distance) || !inside(x, y + distance);
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++, at++) {
      if (values[at] <= limit) continue;
      const outline = nearEdge(x, y, OUTLINE), rim = outline && nearEdge(x, y, 1);
      for (let c = 0; c < 3; c++) data[4 * at + c] = rim ? 0 : color[c];
      data[4 * at + 3] = rim ? 200 : outline ? 255 : inPattern(index, x, y) ? 165 : 75;
    }
}

/** [x, y] of the pixel of a mask that is nearest to its centroid, which may lie outside (a ring); null if it is empty. */
function centreOf(values, width, height, limit) {
  let sumX = 0, sumY = 0, count = 0, nearest = Infinity, centre = [0, 0];
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++, at++) if (values[at] > limit) { sumX += x; sumY += y; count++; }
  if (!count) return null;
  for (let y = 0; y < height; y += 4)
    for (let x = 0; x < width; x += 4) {
      const distance = (x - sumX / count) ** 2 + (y - sumY / count) ** 2;
      if (distance < nearest && values[y * width + x] > limit) { nearest = distance; centre = [x, y]; }
    }
  return centre;
}

function label(context, index, x, y, radius) {
  const [r, g, b] = PALETTE[index % PALETTE.length], ink = 0.3 * r + 0.6 * g + 0.1 * b > 130 ? "#111" : "#fff";
  context.beginPath();
  context.arc(x, y, radius, 0, 7);
  context.fillStyle = `rgb(${r} ${g} ${b})`;
  context.fill();
  context.lineWidth = radius / 7;
  context.strokeStyle = context.fillStyle = ink;
  context.stroke();
  context.font = `700 ${radius * 1.15}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(index + 1, x, y + radius * 0.06);
}

function inPattern(index, x, y) {
  switch (index % PALETTE.length) {
    case 0: return true;
    case 1: return (x + y) % PERIOD < PERIOD / 2.5;
    case 2: return (x % PERIOD - PERIOD / 2) ** 2 + (y % PERIOD - PERIOD / 2) ** 2 < (PERIOD / 3.2) ** 2;
    case 3: return y % PERIOD < PERIOD / 2.5;
    case 4: return (x - y + 500 * PERIOD) % PERIOD < PERIOD / 2.5;
    case 5: return x % PERIOD < PERIOD / 2.5;
    default: return x % PERIOD < PERIOD / 4 || y % PERIOD < PERIOD / 4;
  }
}

/** Colour, pattern and number of a mask, for the legend. */
export function swatch(index) {
  const side = 72, layer = new ImageData(side, side), color = PALETTE[index % PALETTE.length];
  for (let y = 0; y < side; y++)
    for (let x = 0; x < side; x++) {
      const border = Math.min(x, y, side - 1 - x, side - 1 - y) < 5;
      layer.data.set([...color, border ? 255 : inPattern(index, x, y) ? 165 : 60], 4 * (y * side + x));
    }
  const canvas = Object.assign(canvasOf(layer), { className: "swatch" });
  label(canvas.getContext("2d"), index, side / 2, side / 2, 20);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Mask ${index + 1}`);
  return canvas;
}

/** Blend a map over the image, which turns grey. */
export function paintHeat(context, map) {
  const { width, height } = context.canvas, values = enlarge(map, context.canvas);
  const layer = context.getImageData(0, 0, width, height), { data } = layer;
  for (let at = 0, to = 0; at < values.length; at++, to += 4) {
    const level = (values[at] / 255) * (HEAT.length - 1), low = Math.min(Math.floor(level), HEAT.length - 2);
    const grey = (data[to] + data[to + 1] + data[to + 2]) / 3;
    for (let c = 0; c < 3; c++) data[to + c] = 0.35 * grey + 0.65 * (HEAT[low][c] + (level - low) * (HEAT[low + 1][c] - HEAT[low][c]));
  }
  context.putImageData(layer, 0, 0);
}
