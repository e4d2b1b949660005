"""Masks and maps drawn on images: labelled overlays, prediction against truth, and a heat map.

`Drawing` draws every overlay of the project. Colours are those of Okabe and Ito (2008), which remain distinct under all
common forms of colour blindness. In a comparison the masks also differ in form: the prediction is filled, the truth is
a line.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from math import ceil, sqrt

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from cmmasksd.data.masks import mask_to_box
from cmmasksd.errors import UserError

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

PALETTE: tuple[Color, ...] = (
    (0, 114, 178),  # blue
    (240, 228, 66),  # yellow
    (213, 94, 0),  # vermillion
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (230, 159, 0),  # orange
    (204, 121, 167),  # reddish purple
)
"""Colours for several masks in one image; neighbours in the list differ in lightness too."""

PREDICTION_COLOR, TRUTH_COLOR = PALETTE[0], PALETTE[1]  # blue and yellow: the pair that shows on most photographs

DIM = 0.45
"""Brightness of the pixels outside all masks, as a share of the image's."""
FILL = 0.25
"""Share of the colour in the fill of a mask."""
SMALLEST_SIDE = 384
"""Smaller images are enlarged by a whole factor where `Drawing` is asked to, up to this length of the longer side."""
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_MAX_LINES = 3  # per label
_MAX_LETTERS = 200  # per label
_TOGETHER = "\xa0"  # a space at which no line breaks


class Drawing:
    """An image with masks and labels, added one by one: memory does not grow with their number.

    Pixels outside all masks are dimmed. A mask is filled with a translucent colour. Its outline lies outside it, so
    that it hides nothing of a small object, and has a second line in black or white around it: one of the two contrasts
    with any pixel.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        enlarge: enlarge a small image by a whole factor, so that labels are legible.

    Raises:
        UserError: the image is not (H, W, 3) uint8.
    """

    def __init__(self, image: np.ndarray, *, enlarge: bool = False) -> None:
        check_sizes(image)
        self._factor = max(1, SMALLEST_SIDE // max(image.shape)) if enlarge else 1
        self._size = image.shape[:2]
        self._image = self._enlarged(image)
        self._drawn = np.rint(DIM * np.arange(256)).astype(np.uint8)[self._image]
        self._bright = np.zeros(self._image.shape[:2], bool)  # pixels that are not dimmed
        self._labels: list[tuple[str, Color, Box | None]] = []

    def add(
        self, mask: np.ndarray, color: Color, *, fill: float = FILL, label: str = "", width: int | None = None
    ) -> None:
        """Draw a mask over the earlier ones.

        Args:
            mask: (H, W) bool.
            color: RGB, 0 to 255.
            fill: share of the colour in the fill, 0 to 1.
            label: text at the mask, or in a corner if the mask is empty.
            width: width of the coloured outline in pixels; None: see `line_width`.

        Raises:
            UserError: image and mask differ in size, or fill is outside 0 to 1.
        """
        if mask.shape != self._size or mask.dtype != np.bool_:
            raise UserError(
                f"the mask is {mask.shape} {mask.dtype} and the image {self._size}: give (H, W) bool at the"
                " image's own size"
            )
        if not 0.0 <= fill <= 1.0:
            raise UserError(f"alpha must be between 0 and 1, got {fill}")
        mask = self._enlarged(mask)
        box = mask_to_box(mask)
        if label:
            self._labels.append((label, color, box))
        if box is None:
            return
        line = line_width(self._bright) if width is None else width
        reach = line + ceil(line / 2)
        rows, columns = slice(max(0, box[1] - reach), box[3] + reach), slice(max(0, box[0] - reach), box[2] + reach)
        mask, drawn, bright = mask[rows, columns], self._drawn[rows, columns], self._bright[rows, columns]
        fresh = mask & ~bright
        drawn[fresh] = self._image[rows, columns][fresh]
        for channel, value in enumerate(color):
            table = np.rint((1 - fill) * np.arange(256) + fill * value).astype(np.uint8)
            drawn[mask, channel] = table[drawn[mask, channel]]
        near, far = dilated(mask, line), dilated(mask, reach)
        drawn[near & ~mask] = color
        drawn[far & ~near] = opposite(color)
        edge = np.ones_like(self._bright)
        edge[line:-line, line:-line] = False
        drawn[mask & edge[rows, columns]] = color  # along the edges of the image
        bright |= far

    def finish(self) -> np.ndarray:
        """The image with its labels, (H, W, 3) uint8, enlarged if asked. It is not dimmed if all masks are empty."""
        canvas = Image.fromarray(self._drawn if self._bright.any() else self._image)
        draw = ImageDraw.Draw(canvas)
        height, width, _ = self._drawn.shape
        size = font_size(height, width)
        layout = _Layout(self._bright, step=max(4, size // 2))
        for text, color, box in self._labels:
            lines, label_width, label_height = label_lines(text, size, width)
            if not lines or label_width > width or label_height > height:
                continue
            gap = ceil(1.5 * line_width(self._bright))
            x, y = layout.place(label_width, label_height, box, gap)
            found = box is not None
            background, border = (color, opposite(color)) if found else (_BLACK, color)
            draw.rectangle((x, y, x + label_width - 1, y + label_height - 1), background, border)
            for index, line in enumerate(lines):
                spot = (x + size // 3, y + size // 6 + index * line_height(size))
                draw.text(spot, line, opposite(background), font(size))
        return np.array(canvas)

    def _enlarged(self, pixels: np.ndarray) -> np.ndarray:
        return enlarged(pixels, self._factor)


class _Layout:
    """Places labels: near their object, on no other label, and on masks only if there is no other place."""

    def __init__(self, masks: np.ndarray, step: int) -> None:
        self._shape, self._step = masks.shape, step
        self._masks = masks[::step, ::step].astype(float)  # a cell per step x step pixels
        self._labels = np.zeros_like(self._masks)

    def place(self, width: int, height: int, box: Box | None, gap: int) -> tuple[int, int]:
        """The corner (x, y) of a label that lies in the image. `box` is its object's; None: none, top left."""
        x0, y0, x1, y1 = box or (gap, gap + height, gap, gap + height)
        xs = self._candidates(self._shape[1] - width, x0, x1 - width, x0 - width - gap, x1 + gap)
        ys = self._candidates(self._shape[0] - height, y0 - height - gap, y1 + gap, y0 + gap)
        across = np.maximum(0, np.maximum(x0 - (xs + width), xs - x1))
        along = np.maximum(0, np.maximum(y0 - (ys + height), ys - y1))
        cost = (np.hypot(along[:, None], across) + 0.05 * abs(xs - x0)) / self._step
        cost += 0.05 * (abs(ys - (y0 - height - gap)) / self._step)[:, None]
        cost += 8 * self._share(self._masks, xs, ys, width, height)
        covered = _overlap(ys, height, y0, y1)[:, None] * _overlap(xs, width, x0, x1)  # share of the object's box
        cost += 8 * covered
        cost += 1e6 * self._share(self._labels, xs, ys, width, height)
        row, column = np.unravel_index(np.argmin(cost), cost.shape)
        x, y = int(xs[column]), int(ys[row])
        self._labels[
            y // self._step : -(-(y + height) // self._step), x // self._step : -(-(x + width) // self._step)
        ] = 1
        return x, y

    def _candidates(self, last: int, *wanted: int) -> np.ndarray:
        return np.unique(np.clip([*range(0, last + 1, self._step), last, *wanted], 0, last))

    def _share(self, cells: np.ndarray, xs: np.ndarray, ys: np.ndarray, width: int, height: int) -> np.ndarray:
        """Mean of the cells under a label at every (y, x)."""
        total = np.pad(cells.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        top, left = ys // self._step, xs // self._step
        bottom, right = -(-(ys + height) // self._step), -(-(xs + width) // self._step)
        sums = total[bottom][:, right] - total[top][:, right] - total[bottom][:, left] + total[top][:, left]
        return sums / ((bottom - top)[:, None] * (right - left))


def _overlap(starts: np.ndarray, length: int, first: int, last: int) -> np.ndarray:
    """Share of first..last, half-open, that start..start+length covers."""
    return np.maximum(0, np.minimum(starts + length, last) - np.maximum(starts, first)) / max(1, last - first)


def overlay(
    image: np.ndarray, mask: np.ndarray, color: Color = PALETTE[0], alpha: float = FILL, *, label: str = ""
) -> np.ndarray:
    """Draw one mask, see `Drawing`.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        mask: (H, W) bool.
        color: RGB, 0 to 255.
        alpha: share of the colour in the fill, 0 to 1.
        label: text at the mask.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: image and mask differ in size or kind, or alpha is outside 0 to 1.
    """
    drawing = Drawing(image)
    drawing.add(mask, color, fill=alpha, label=label)
    return drawing.finish()


def comparison(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The prediction as a filled overlay under the truth's outline.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        truth: (H, W) bool.
        prediction: (H, W) bool.

    Returns:
        (H, W, 3) uint8: prediction in PREDICTION_COLOR, thinner outline of the truth in TRUTH_COLOR.

    Raises:
        UserError: the sizes differ.
    """
    drawing = Drawing(image)
    drawing.add(prediction, PREDICTION_COLOR, label="" if prediction.any() else "not found")
    drawing.add(truth, TRUTH_COLOR, fill=0, width=ceil(0.7 * line_width(truth)))
    return drawing.finish()


def label_text(text: str, score: float | None, number: int) -> str:
    """The label of a segmentation.

    Args:
        text: the sentence. Letters that the font lacks become "?".
        score: its score; None: not found.
        number: names a sentence of which the font has no letter.
    """
    printed = "".join(_printable(letter) for letter in unicodedata.normalize("NFC", text[:_MAX_LETTERS]))
    printed = re.sub(r"\?{2,}", "?", " ".join(printed.split()))
    if not any(letter.isalnum() for letter in printed):
        printed = f"sentence {number}"
    return f"{printed}:{_TOGETHER}not{_TOGETHER}found" if score is None else f"{printed} {score:.2f}"


def label_lines(text: str, size: int, width: int) -> tuple[list[str], int, int]:
    """A label in at most three lines, cut before its last word if it is longer.

    Args:
        text: the label.
        size: size of the font in pixels.
        width: width of the image in pixels.

    Returns:
        Its lines, and width and height of its box in pixels; no lines if the image is too narrow for any word.
    """
    padding = size // 3
    limit = max(width * 0.6, min(width, 12 * size)) - 2 * padding
    *words, last = text.split(" ")
    lines = _wrapped([*words, last], size, limit)
    while len(lines) > _MAX_LINES and words:
        words = words[:-1]
        lines = _wrapped([*words, "…", last], size, limit)
    if not all(lines):
        return [], 0, 0
    box_width = ceil(max(_length(size, line) for line in lines)) + 2 * padding
    return [line.replace(_TOGETHER, " ") for line in lines], box_width, len(lines) * line_height(size) + 2 * (size // 6)


def _wrapped(words: list[str], size: int, limit: float) -> list[str]:
    """Words in lines of at most `limit` pixels. A longer word is cut; it is "" if not even "…" fits."""
    lines: list[str] = []
    for word in words:
        if _length(size, word) > limit:
            while word and _length(size, f"{word}…") > limit:
                word = word[:-1]
            word = word and f"{word}…"
        if lines and _length(size, f"{lines[-1]} {word}") <= limit:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _length(size: int, text: str) -> float:
    return font(size).getlength(text.replace(_TOGETHER, " "))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has Latin letters only."""
    return ImageFont.load_default(size)  # pyright: ignore (FreeType is in every wheel)


def font_size(height: int, width: int) -> int:
    """Size of labels in pixels, in proportion to the image; at least 11, which is legible."""
    return max(11, min(round(sqrt(height * width) / 28), min(height, width) // 8))


def line_height(size: int) -> int:
    """Distance of the lines of a label in pixels."""
    return round(1.25 * size)


@cache
def _printable(letter: str) -> str:
    """A letter that the font has: itself, itself without accents, " " for a control character, else "?"."""
    if letter.isspace() or unicodedata.category(letter).startswith("C"):
        return " "
    for candidate in (letter, unicodedata.normalize("NFKD", letter)[:1]):
        if _glyph(candidate) != _glyph("\uffff"):
            return candidate
    return "?"


def _glyph(letter: str) -> bytes:
    """The pixels of a letter, or those of the box that stands for letters that the font lacks."""
    canvas = Image.new("L", (64, 48))
    ImageDraw.Draw(canvas).text((8, 4), letter, 255, font(32))
    return canvas.tobytes()


def opposite(color: Color) -> Color:
    """Black or white, whichever contrasts more with a colour (by the contrast ratio of WCAG)."""
    return _BLACK if luminance(color) > 0.179 else _WHITE


def luminance(color: Color) -> float:
    """Relative luminance of an sRGB colour, 0 to 1."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """(H, W) bool: the pixels within about `radius` (less than 255) of a mask; an octagon in place of the disc."""
    image, result = Image.fromarray(mask.astype(np.uint8) * 255), mask.copy()
    long, middle, short = radius, int(0.75 * radius), int(0.4 * radius)
    for x, y in ((long, short), (middle, middle), (short, long)):
        row = image.filter(ImageFilter.BoxBlur((x, 0))).point([0] + [255] * 255)
        result |= np.asarray(row.filter(ImageFilter.BoxBlur((0, y)))) > 0
    return result


def enlarged(pixels: np.ndarray, factor: int) -> np.ndarray:
    """An image or mask with every pixel repeated `factor` times in both directions."""
    return pixels if factor == 1 else pixels.repeat(factor, axis=0).repeat(factor, axis=1)


_HEAT = np.array([(20, 20, 60), (0, 114, 178), (230, 159, 0), (250, 240, 130)], float)  # dark to light: reads in grey


def heat(image: np.ndarray, values: np.ndarray, alpha: float = 0.65) -> np.ndarray:
    """Draw a map of values over an image, from its minimum (dark blue) to its maximum (light yellow).

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        values: (h, w), any numbers; each cell covers its part of the image.
        alpha: share of the colours.

    Returns:
        (H, W, 3) uint8.

    Raises:
        UserError: the image is not (H, W, 3) uint8.
    """
    check_sizes(image)
    spread = float(values.max() - values.min())
    level = (values - values.min()) / spread if spread else np.zeros(values.shape)
    position = level * (len(_HEAT) - 1)
    low = np.minimum(position.astype(int), len(_HEAT) - 2)
    colours = _HEAT[low] + (position - low)[..., None] * (_HEAT[low + 1] - _HEAT[low])  # (h, w, 3)
    rows = np.arange(image.shape[0]) * values.shape[0] // image.shape[0]
    columns = np.arange(image.shape[1]) * values.shape[1] // image.shape[1]
    grey = image.mean(2, keepdims=True)
    return np.rint((1 - alpha) * grey + alpha * colours[rows[:, None], columns]).astype(np.uint8)


def line_width(mask: np.ndarray) -> int:
    """Width of outlines in pixels, in proportion to the image."""
    return max(1, round(sqrt(mask.size) / 110))


def check_sizes(image: np.ndarray, *masks: np.ndarray) -> None:
    """Check that an image is (H, W, 3) uint8 and that masks are (H, W) bool of the same size.

    Raises:
        UserError: they are not; the message names both sizes.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"the image is {image.shape} {image.dtype}: give (H, W, 3) uint8 RGB")
    for mask in masks:
        if mask.shape != image.shape[:2] or mask.dtype != np.bool_:
            raise UserError(
                f"the mask is {mask.shape} {mask.dtype} and the image {image.shape[:2]}: give (H, W) bool at the"
                " image's own size"
            )
