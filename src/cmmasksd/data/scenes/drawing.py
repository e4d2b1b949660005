"""A scene's pixels, and the object that each pixel shows.

Textures, stencils and noise are drawn once and cropped: one core draws more than 500 scenes a second.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache

import numpy as np

from cmmasksd.data.scenes.vocabulary import COLOURS, Scene


@lru_cache(maxsize=4096)
def stencil(shape: str, radius: int, turn: int) -> np.ndarray:
    """Coverage of a shape's pixels, (2r+3, 2r+3) float32 in [0, 1], antialiased by 4 x 4 supersampling."""
    n, over = 2 * radius + 3, 4
    grid = (np.arange(n * over) + 0.5) / over - n / 2
    x, y = np.meshgrid(grid / radius, grid / radius)
    angle = math.radians(8 * turn)
    x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if shape == "circle":
        inside = x**2 + y**2 <= 0.94**2
    elif shape == "square":
        inside = np.maximum(abs(x), abs(y)) <= 0.82
    elif shape == "triangle":
        inside = (y <= 0.72) & (y >= 1.75 * abs(x) - 0.95)
    elif shape == "star":
        theta, rho = np.arctan2(x, -y), np.hypot(x, y)
        wedge = abs((theta + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)  # 0 at a tip, pi/5 between two tips
        inner = 0.42
        a, b = inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
        inside = rho * (np.sin(wedge) * (1 - a) + np.cos(wedge) * b) <= b
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.28) & (np.maximum(abs(x), abs(y)) <= 0.92)
    elif shape == "heart":
        u, v = 1.2 * x, -1.2 * y + 0.12
        inside = (u**2 + v**2 - 0.95 * 0.85) ** 3 <= u**2 * v**3 * 1.4
    elif shape == "crescent":
        inside = (x**2 + y**2 <= 0.95**2) & ((x - 0.45) ** 2 + y**2 >= 0.72**2)
    else:
        inside = abs(x) / 0.62 + abs(y) / 0.98 <= 1  # diamond: taller than wide, unlike a turned square
    return inside.reshape(n, over, n, over).mean((1, 3), dtype=np.float32)


@lru_cache(maxsize=4096)
def footprint(shape: str, radius: int, turn: int) -> tuple[np.ndarray, int]:
    """The pixels that a shape covers by at least half, (2r+3, 2r+3) bool, and their number."""
    owned = stencil(shape, radius, turn) >= 0.5
    return owned, int(np.count_nonzero(owned))


_TILE = 320  # side of the textures, which are cropped at random offsets; larger scenes wrap around


@lru_cache(maxsize=1)
def _textures() -> tuple[list[np.ndarray], np.ndarray]:
    """Brightness tiles in -1 .. 1 as float32, and one tile of pixel noise, (3, H, W) int16."""
    rng = np.random.default_rng(20230519)
    y, x = np.mgrid[:_TILE, :_TILE] * (2 * math.pi / _TILE)
    tiles = [np.sin(a * x + b * y) for a, b in ((6, 2), (-3, 9), (14, 14), (0, 20))]
    tiles += [np.sign(np.sin(10 * x) * np.sin(10 * y)), np.sin(8 * x) * np.sin(8 * y)]
    tiles += [np.sin(5 * x + 3 * np.sin(4 * y))]
    frequency = np.fft.fftfreq(_TILE)
    for power in (1.0, 1.4, 1.8):  # clouds, from rough to smooth
        amplitude = 1 / np.maximum(np.hypot(frequency[:, None], frequency), 1 / _TILE) ** power
        cloud = np.fft.ifft2(amplitude * np.exp(2j * math.pi * rng.random((_TILE, _TILE)))).real
        tiles.append(np.clip(cloud / (2 * cloud.std()), -1, 1))
    noise = np.clip(rng.normal(0, 256, (_TILE, _TILE, 3)), -768, 767).astype(np.int16)
    return [tile.astype(np.float32) for tile in tiles], np.ascontiguousarray(noise.transpose(2, 0, 1))


def _crop(tile: np.ndarray, scene_size: int, draw: random.Random) -> np.ndarray:
    """A random (scene_size, scene_size) part of a tile (..., _TILE, _TILE)."""
    if scene_size <= _TILE // 2:
        top, left = draw.randrange(_TILE - scene_size), draw.randrange(_TILE - scene_size)
        return tile[..., top : top + scene_size, left : left + scene_size]
    at = np.arange(scene_size) + draw.randrange(_TILE)
    return tile[..., at[:, None] % _TILE, (at + draw.randrange(_TILE)) % _TILE]


def _pattern(fill: str, n: int, scale: float, draw: random.Random) -> np.ndarray | None:
    """The pixels of an object that have its darker colour, (n, n) bool; None for a solid one."""
    # drawn for every fill, so that the rest of a twin (captions.py) looks the same
    direction, phase = draw.getrandbits(2), draw.random()
    if fill == "solid":
        return None
    at = np.arange(n)
    period = 6.0 * scale
    if fill == "striped":
        a, b = ((1.0, 0.0), (0.0, 1.0), (0.7, 0.7), (0.7, -0.7))[direction]
        return (at[:, None] * a + at * b + phase * period) % period < period / 2
    u = ((at + phase * period) % period - period / 2) ** 2
    return u[:, None] + u <= (0.32 * period) ** 2


def render(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene.

    Returns:
        image: (scene_size, scene_size, 3) uint8 RGB.
        owner: (scene_size, scene_size) int8, index of the object that each pixel shows, -1 for the background.
    """
    draw = random.Random(scene.look)
    size, scale = scene.scene_size, scene.scene_size / 128
    tiles, noise = _textures()
    base = [draw.randrange(70, 170)] * 3
    base = [level + draw.randrange(-22, 23) for level in base]
    shade = _crop(draw.choice(tiles), size, draw) * draw.uniform(6, 26)
    # (3, H, W) until the end: numpy is slow on an innermost axis of 3 elements
    image = (shade + np.array(base, np.float32)[:, None, None]).astype(np.int16)
    owner = np.full((size, size), -1, np.int8)
    for index, thing in enumerate(scene.objects):
        alpha = stencil(thing.shape, thing.radius, thing.turn)
        owned, _ = footprint(thing.shape, thing.radius, thing.turn)
        n, half = alpha.shape[0], thing.radius + 1
        top, left = thing.y - half, thing.x - half
        inner = (slice(max(0, -top), min(n, size - top)), slice(max(0, -left), min(n, size - left)))
        outer = (slice(max(0, top), min(size, top + n)), slice(max(0, left), min(size, left + n)))
        jitter = draw.randrange(-14, 15)
        levels = [level + jitter + draw.randrange(-8, 9) for level in COLOURS[thing.colour]]
        colour = np.array(levels, np.float32)[:, None, None]
        pattern = _pattern(thing.fill, n, scale, draw)
        paint = colour if pattern is None else np.where(pattern[inner], colour * 0.4, colour)
        below = image[:, outer[0], outer[1]]
        below[...] = below + (paint - below) * alpha[inner]
        owner[outer][owned[inner]] = index
    strength = draw.randrange(2, 15)  # standard deviation of the noise, in grey levels
    image += (_crop(noise, size, draw) * np.int16(strength)) >> 8
    np.clip(image, 0, 255, out=image)
    pixels = np.empty((size, size, 3), np.uint8)
    for channel in range(3):
        pixels[:, :, channel] = image[channel]
    return pixels, owner
