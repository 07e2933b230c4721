"""The pictures of the tiny world: one object with a pattern, turned and placed, on a background.

N scenes are drawn at once, R x R pixels each; x and y are positions in a picture.
"""

import math

import torch

from tiny.scenes import ATTRIBUTES, scene_geometry

WORLD_SIZE = 128  # px: the largest that an encoder of the tiny preset takes

# The pattern in half images: stripes and bands, faint, of one width whatever the object's size
STRIPE = 0.25
BAND = 0.167
RIM = 0.04  # the dark outline


def _polygon(x: torch.Tensor, y: torch.Tensor, *edges: tuple) -> torch.Tensor:
    """Return the signed distance to a convex polygon, an intersection of a x + b y <= c."""
    return torch.stack([(a * x + b * y - c) / math.hypot(a, b) for a, b, c in edges]).amax(0)


def _shape_distance(name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the signed distance (negative inside) to a shape that lies within radius 1."""
    def box(x0, x1, y0, y1):
        return _polygon(x, y, (-1, 0, -x0), (1, 0, x1), (0, -1, -y0), (0, 1, y1))

    def disc(cx, cy, r):
        return torch.hypot(x - cx, y - cy) - r

    if name == "arrow":  # points up
        head = _polygon(x, y, (1.1, -1, 1.0), (-1.1, -1, 1.0), (0, 1, 0.0))
        return torch.minimum(head, box(-0.24, 0.24, -0.1, 0.96))
    if name == "fish":  # swims to the left: an oval body, a forked tail
        body = (torch.hypot((x + 0.22) / 0.75, y / 0.48) - 1) * 0.48
        tail = _polygon(x, y, (-0.9, 1, -0.2), (-0.9, -1, -0.2), (1, 0, 0.8))
        fork = _polygon(x, y, (-0.9, 1, -0.58), (-0.9, -1, -0.58))
        return torch.minimum(body, torch.maximum(tail, -fork))
    if name == "hammer":
        return torch.minimum(box(-0.72, 0.72, -0.68, -0.14), box(-0.22, 0.22, -0.5, 0.96))
    if name == "heart":
        point = _polygon(x, y, (1, 1, 0.736), (-1, 1, 0.736), (0.425, -1, 0.33),
                         (-0.425, -1, 0.33))
        lobes = torch.minimum(disc(-0.43, -0.33, 0.45), disc(0.43, -0.33, 0.45))
        return torch.minimum(lobes, point)
    if name == "house":
        roof = _polygon(x, y, (1, -1, 0.96), (-1, -1, 0.96), (0, 1, 0.0))
        return torch.minimum(box(-0.62, 0.62, -0.1, 0.76), roof)
    return torch.maximum(disc(0, 0, 0.98), -disc(0.5, -0.1, 0.78))  # moon: a crescent


_COLOURS = torch.tensor([[.95, .15, .15], [1., .60, .10], [1., .95, .25],
                         [.15, .85, .25], [.25, .50, 1.], [.75, .30, .95]])
_BACKGROUNDS = torch.tensor([[[.45, .70, .95], [.85, .93, 1.]],     # sky: top, bottom
                             [[.35, .60, .25], [.50, .75, .35]],    # grass
                             [[.85, .75, .55], [.95, .88, .70]],    # sand
                             [[.88, .88, .92], [.98, .98, 1.]]])    # snow
_GRAIN = torch.tensor([0.02, 0.16, 0.08, 0.10])     # grass is rough, the sky smooth
# a pattern is paint on the surface, a mix of two waves: a sin(u) + b sin(v) + c sin(u) sin(v) + d
_PAINT = torch.tensor([[0., 0, 0, -1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]])


def render(scenes: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Draw scenes (N, 7): uint8 (N, 3, R, R). The same scenes and seed give the same bytes."""
    generator = torch.Generator().manual_seed(seed + 2_000_003)
    geometry = scene_geometry(scenes, seed)
    chunks = []
    for i in range(0, len(scenes), 32):  # 32 at a time stay in the processor's cache
        some = {key: value[i:i + 32] for key, value in geometry.items()}
        chunks.append(_render_chunk(scenes[i:i + 32], some, generator))
    return torch.cat(chunks)


def _render_chunk(scenes: torch.Tensor, geometry: dict, generator: torch.Generator) -> torch.Tensor:
    n, R = len(scenes), WORLD_SIZE
    pixel = 2 / R  # in half images
    shape, colour, pattern, background = (scenes[:, i] for i in (0, 1, 2, 6))
    line = (torch.arange(R) + 0.5) / R * 2 - 1
    Y, X = line[None, :, None], line[None, None, :]

    # background: a vertical gradient and a noise of its own kind
    top, bottom = _BACKGROUNDS[background].unbind(1)
    t = ((Y + 1) / 2)[:, None]                                                    # (1, 1, R, 1)
    gradient = top[:, :, None, None] * (1 - t) + bottom[:, :, None, None] * t     # (N, 3, R, 1)
    noise = torch.rand(n, 1, R, R, generator=generator) - 0.5                     # (N, 1, R, R)
    image = gradient + _GRAIN[background][:, None, None, None] * noise            # (N, 3, R, R)

    # the object's own frame: centred and turned, in half images
    cx, cy, radius, angle = (geometry[k][:, None, None] for k in ("x", "y", "radius", "angle"))
    dx, dy = X - cx, Y - cy
    cos, sin = angle.cos(), angle.sin()
    x, y = cos * dx + sin * dy, cos * dy - sin * dx                               # (N, R, R)
    distance = torch.empty(n, R, R)
    for k, name in enumerate(ATTRIBUTES["shape"]):
        rows = (shape == k).nonzero()[:, 0]
        unit = _shape_distance(name, x[rows] / radius[rows], y[rows] / radius[rows])
        distance[rows] = unit * radius[rows]
    inside = (0.5 - distance / pixel).clamp(0, 1)[:, None]           # one pixel of anti-aliasing
    depth = (distance + RIM / 2).abs() - RIM / 2                     # negative on the outline
    rim = (0.5 - depth / pixel).clamp(0, 1)[:, None]                              # (N, 1, R, R)

    # the pattern
    u, v = (x * (2 * math.pi / STRIPE)).sin(), (y * (2 * math.pi / BAND)).sin()   # (N, R, R)
    a, b, c, d = _PAINT[pattern].T[:, :, None, None]
    paint = (3 * (a * u + b * v + c * u * v + d)).clamp(-1, 1)[:, None]           # (N, 1, R, R)
    tint = 0.06 * torch.randn(n, 3, generator=generator)
    body = (_COLOURS[colour] + tint)[:, :, None, None]                            # (N, 3, 1, 1)
    body = body * ((0.7 - 0.2 * paint) * (1 - 0.75 * rim))                        # (N, 3, R, R)
    image.lerp_(body, inside)                                                     # (N, 3, R, R)
    return image.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
