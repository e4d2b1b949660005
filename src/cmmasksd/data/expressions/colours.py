"""Colours of objects: measured in their masks, and those by which people name the objects of a class.

Colours are regions of CIELAB in lightness, chroma and hue. A pixel in the core of a region surely has the colour's
name; one in the wider region around it might be called so. Pixels between two cores have no sure name.
"""

from __future__ import annotations

import numpy as np

from cmmasksd.data.expressions.words import ANIMALS, PERSONS

MIN_PIXELS = 150
"""Colours of fewer pixels are not measured."""

_SAMPLE = 2000  # pixels of a mask that are looked at, evenly spread
_CORES = {
    # name: lightness from, to; chroma from, to; hue from, to in degrees (may wrap)
    "black": (0, 20, 0, 9, 0, 360),
    "white": (78, 101, 0, 13, 0, 360),
    "gray": (36, 68, 0, 7, 0, 360),
    "red": (22, 60, 42, 200, 12, 45),
    "orange": (48, 82, 42, 200, 50, 74),
    "yellow": (66, 101, 42, 200, 82, 108),
    "green": (18, 92, 20, 200, 115, 170),
    "blue": (16, 82, 20, 200, 235, 306),
    "purple": (14, 62, 22, 200, 308, 335),
    "pink": (58, 92, 20, 200, 338, 22),
    "brown": (18, 56, 14, 48, 38, 82),
}
_AROUND = (14, 9, 22)  # lightness, chroma and hue by which somebody might still use the name
_GREYS = ("black", "white", "gray")
COLOURS = (*_CORES, "black and white")
MIN_SHARE = 0.55
"""Share of the pixels in the core of a colour that makes it the object's colour."""
MAX_OTHER = 0.2
"""Share of the pixels that might be called by a colour up to which nobody would name the object by it."""

_NO_COLOURS = frozenset(
    (
        *("skin", "glasses", "tv", "laptop", "cell phone", "clock", "sink", "microwave", "traffic light", "stop sign"),
        *(
            "fork",
            "knife",
            "spoon",
            "scissors",
            "wine glass",
            "bottle",
            "bowl",
            "bicycle",
            "tennis racket",
            "parking meter",
        ),
        *("pizza", "sandwich", "hot dog", "broccoli", "carrot", "orange", "banana", "zebra", "giraffe"),
    )
)
_ANIMAL_COLOURS = frozenset(("black", "white", "brown", "gray", "black and white"))
_CLOTHES_COLOURS = frozenset(("red", "green", "blue", "yellow", "black", "white", "purple"))  # the rest could be skin
_HAIR_COLOURS = frozenset(("black", "brown"))


def measure_colours(image: np.ndarray, mask: np.ndarray) -> dict[str, tuple[float, float]] | None:
    """Shares of an object's pixels by colour.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool.

    Returns:
        For each colour the share of pixels that surely have it, and of those that might be called so; None where the
        object has too few pixels.
    """
    places = np.flatnonzero(mask)
    if len(places) < MIN_PIXELS:
        return None
    lightness, chroma, hue = _lch(image.reshape(-1, 3)[places[:: max(1, len(places) // _SAMPLE)]])
    shares = {}
    for name, (dark, light, dull, vivid, first, last) in _CORES.items():
        part = []
        for by_lightness, by_chroma, by_hue in ((0, 0, 0), _AROUND):
            inside = (lightness >= dark - by_lightness) & (lightness < light + by_lightness)
            inside &= (chroma >= dull - by_chroma) & (chroma < vivid + by_chroma)
            if last - first < 360:
                turn = (hue - (first - by_hue)) % 360
                inside &= turn <= (last - first) % 360 + 2 * by_hue
            part.append(float(inside.mean()))
        shares[name] = (part[0], part[1])
    return shares


def sure_colour(shares: dict[str, tuple[float, float]], least: float = MIN_SHARE) -> str | None:
    """The one colour that an object surely has, if any: at least this share of its pixels, and no second colour.

    Black, gray and white have no tint either: in a dark image much looks black.
    """
    ranked = sorted(((core, name) for name, (core, _) in shares.items()), reverse=True)
    (share, name), (second, other) = ranked[:2]
    if share >= least and second <= 0.3 * share:
        tinted = max(loose for shade, (_, loose) in shares.items() if shade not in _GREYS)
        return None if name in _GREYS and tinted > 0.35 else name
    if {name, other} == {"black", "white"} and second >= 0.22 and share + second >= 0.75:
        return "black and white"
    return None


def may_be_called(shares: dict[str, tuple[float, float]] | None, colour: str, most: float = MAX_OTHER) -> bool:
    """Whether somebody might name an object by this colour, which more than this share of its pixels might have.

    An object that was not measured might have any.
    """
    if shares is None:
        return True
    if colour == "black and white":
        return min(shares["black"][1], shares["white"][1]) > most / 2
    return shares[colour][1] > most


def naming_colours(name: str) -> frozenset[str]:
    """The colours by which people name objects of a class."""
    if name in _NO_COLOURS:
        return frozenset()
    if name in PERSONS:
        return _CLOTHES_COLOURS
    if name == "hair":
        return _HAIR_COLOURS
    if name in ANIMALS and name not in ("bird", "teddy bear"):
        return _ANIMAL_COLOURS | {"orange"} if name == "cat" else _ANIMAL_COLOURS
    return frozenset(COLOURS) - {"black and white"}


def _lch(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """sRGB pixels (P, 3) uint8 -> CIELAB (D65) lightness 0 to 100, chroma, and hue in degrees, (P,) each."""
    values = pixels.astype(np.float32) / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]],
        dtype=np.float32,
    )
    relative = linear @ (matrix / np.array([[0.95047], [1.0], [1.08883]], dtype=np.float32)).T
    curve = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    lightness = 116 * curve[:, 1] - 16
    a, b = 500 * (curve[:, 0] - curve[:, 1]), 200 * (curve[:, 1] - curve[:, 2])
    return lightness, np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
