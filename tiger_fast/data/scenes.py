"""Embedded data: indoor-like scenes, ray-cast from an index, with labels for five dense tasks and no download.

A scene is a function of (seed, offset + index, height, width) alone. Every random choice is an integer hash, and pixels
are made with elementwise + - * / sqrt, floor and comparisons, each of which IEEE 754 rounds in one way only: the bytes
are the same in every process, at every thread count and on every machine. Hence no sin, exp or pow, and no sum whose
order a library may choose; rotations use the rational form cos = (1 - t^2) / (1 + t^2), sin = 2 t / (1 + t^2).

Frames: the world has x to the right, y up, z forward and its floor at y = 0, in metres. The camera has x to the right,
y down and z forward; depth is the distance along its z, and normals are given in it, pointing towards the camera.
"""

import operator
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch.utils.data import Dataset

from tiger_fast._extras import require

np = require("numpy", extra="train")

CLASSES = ("floor", "wall", "ceiling", "box", "table", "ball", "column", "panel", "window")
NUM_CLASSES = len(CLASSES)
IGNORE_INDEX = 255
MAX_DEPTH = 12.0  # metres; longer than the diagonal of the largest room (7 x 3.2 x 9 m, 11.9 m)

# Where each consumer takes its scenes, as `offset`, so that no two of them meet.
TRAIN_OFFSET = 0
HELDOUT_OFFSET = 500_000
SPECIALIST_OFFSET = 1_000_000  # the frozen specialists' training scenes
SPECIALIST_HELDOUT_OFFSET = 1_500_000  # the specialists' own linear probes

FLOOR, WALL, CEILING, BOX, TABLE, BALL, COLUMN, PANEL, WINDOW = range(NUM_CLASSES)
PLAIN, CHECKER, STRIPES, NOISE = range(4)

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_TINY = 1e-6  # replaces a direction component of 0, so that slabs never divide 0 by 0
_DRAWS = 1024  # more than the most that one scene uses, about 500 (a longer stream costs 5 us)


class Scenes(Dataset):
    """Deterministic indoor-like scenes as a map-style data set of ``size`` samples.

    Item ``i`` is scene ``offset + i`` of ``seed``, a dict of tensors:

    - ``image`` float32 (3, H, W) in [0, 1], in steps of 1/255
    - ``semseg`` int64 (H, W): an index into `CLASSES`, or 255 where an object is unlabelled
    - ``depth`` float32 (1, H, W): metres along the viewing axis; 0 = invalid (windows)
    - ``normals`` float32 (3, H, W): unit, towards the camera, in the camera frame (x right, y down, z forward);
      the zero vector = invalid (windows)
    - ``saliency`` int64 (H, W) in {0, 1}: 1 on the things whose hue is unlike the rest's; 255 on an unlabelled object
    - ``edge`` float32 (1, H, W) in {0, 1}: 1 where the right or lower neighbour belongs to another thing or another
      surface of the room; 255 on and beside an unlabelled object

    Args:
        size: number of scenes, at least 0.
        offset: the first scene; see `TRAIN_OFFSET`, `HELDOUT_OFFSET`, `SPECIALIST_OFFSET`.
        height: rows of the image, at least 8.
        width: columns of the image, at least 8.
        seed: another seed is another world.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
        IndexError: an index outside [0, size).
    """

    def __init__(self, size: int, offset: int = 0, height: int = 96, width: int = 128, seed: int = 0) -> None:
        self.size = _integer("size", size, 0)
        self.offset = _integer("offset", offset, 0)
        self.height = _integer("height", height, 8)
        self.width = _integer("width", width, 8)
        self.seed = _integer("seed", seed, 0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        arrays = render(self.offset + index, self.height, self.width, self.seed)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def render(scene: int, height: int = 96, width: int = 128, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw one scene; arrays of the shapes, types and meaning that `Scenes` gives."""
    draws = _Draws(seed, scene)
    room = _Room.draw(draws)
    camera = _Camera.draw(draws, room, height, width)
    things = _draw_things(draws, room, camera)
    frame = _Frame(camera, room)
    for patch in things.patches:
        frame.paint(patch)
    for number, solid in things.solids:
        frame.cast(number, solid)
    salient, unlabelled = _choose(draws, things.classes, frame.thing)
    image = _shade(draws, things, frame, salient)
    return _labels(things.classes, frame, image, salient, unlabelled)


def _integer(name: str, value: int, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers: a counter hashed with splitmix64's mixer.


def _mix64(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix64_array(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mix32_array(value: np.ndarray) -> np.ndarray:
    """A 32-bit mixer for pixels: half the memory of the 64-bit one, and noise needs no more."""
    value = (value ^ (value >> np.uint32(16))) * np.uint32(0x7FEB352D)
    value = (value ^ (value >> np.uint32(15))) * np.uint32(0x846CA68B)
    return value ^ (value >> np.uint32(16))


class _Draws:
    """The scene's stream of uniform numbers in [0, 1), as Python floats: they never widen a float32 array."""

    def __init__(self, seed: int, scene: int) -> None:
        key = _mix64((_mix64((seed + _GOLDEN) & _MASK64) + scene * _GOLDEN) & _MASK64)
        counters = np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
        self._stream = iter(((_mix64_array(counters) >> np.uint64(11)) * 2.0**-53).tolist())
        self.key32 = key & 0xFFFFFFFF

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * next(self._stream)

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(next(self._stream) * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return next(self._stream) < probability

    def rotation(self, most: float) -> tuple[float, float]:
        """(cos, sin) of an angle whose half has a tangent in [-most, most]."""
        return _rotation(self.uniform(-most, most))


def _rotation(half_tangent: float) -> tuple[float, float]:
    squared = half_tangent * half_tangent
    return (1.0 - squared) / (1.0 + squared), 2.0 * half_tangent / (1.0 + squared)


# ---------------------------------------------------------------------------------------------------------------------
# The stage: room and camera.


@dataclass(frozen=True)
class _Room:
    low: tuple[float, float, float]
    high: tuple[float, float, float]

    @staticmethod
    def draw(draws: _Draws) -> "_Room":
        half = draws.uniform(1.8, 3.5)
        return _Room((-half, 0.0, 0.0), (half, draws.uniform(2.4, 3.2), draws.uniform(4.5, 9.0)))


@dataclass(frozen=True)
class _Camera:
    position: tuple[float, float, float]
    right: tuple[float, float, float]
    down: tuple[float, float, float]
    forward: tuple[float, float, float]
    focal: float  # in pixels
    height: int
    width: int

    @staticmethod
    def draw(draws: _Draws, room: _Room, height: int, width: int) -> "_Camera":
        """Near the back of the room, turned by up to 31 degrees to a side and tilted from 5 up to 20 degrees down."""
        x = draws.uniform(0.5 * room.low[0], 0.5 * room.high[0])
        position = (x, draws.uniform(1.1, 1.9), draws.uniform(0.3, 0.2 * room.high[2]))
        cos_yaw, sin_yaw = draws.rotation(0.28)
        cos_tilt, sin_tilt = _rotation(draws.uniform(-0.04, 0.18))
        return _Camera(
            position,
            right=(cos_yaw, 0.0, -sin_yaw),
            down=(-sin_yaw * sin_tilt, -cos_tilt, -cos_yaw * sin_tilt),
            forward=(sin_yaw * cos_tilt, -sin_tilt, cos_yaw * cos_tilt),
            focal=width * draws.uniform(0.7, 0.95),
            height=height,
            width=width,
        )

    def rays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """World directions (H, W) whose length along the viewing axis is 1, so that a ray's parameter is depth."""
        x = ((np.arange(self.width, dtype=np.float32) + 0.5) - 0.5 * self.width) / self.focal
        y = ((np.arange(self.height, dtype=np.float32) + 0.5) - 0.5 * self.height) / self.focal
        axes = zip(self.right, self.down, self.forward, strict=True)
        return tuple(_nonzero((x * r + f)[None, :] + (y * d)[:, None]) for r, d, f in axes)

    def window(self, centre: tuple[float, float, float], radius: float) -> tuple[slice, slice]:
        """Rows and columns that hold the image of a ball (all of them when it reaches behind the camera)."""
        offset = _minus(centre, self.position)
        depth = _dot(offset, self.forward)
        if depth - radius < 0.1:
            return slice(0, self.height), slice(0, self.width)
        span = []
        for axis, size in ((self.down, self.height), (self.right, self.width)):
            middle = _dot(offset, axis)
            low, high = middle - radius, middle + radius
            first = low / (depth - radius if low < 0 else depth + radius)
            last = high / (depth + radius if high < 0 else depth - radius)
            start = max(0, min(size, int(first * self.focal + 0.5 * size) - 1))
            span.append(slice(start, max(start, min(size, int(last * self.focal + 0.5 * size) + 2))))
        return span[0], span[1]


def _dot(a, b) -> float:
    """Three products added in one fixed order; of numbers or of arrays."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _minus(a, b) -> tuple:
    return a[0] - b[0], a[1] - b[1], a[2] - b[2]


def _along(origin, distance, ray) -> list[np.ndarray]:
    return [origin[axis] + distance * ray[axis] for axis in range(3)]


def _pick(condition: np.ndarray, yes: float, no: float) -> np.ndarray:
    return np.where(condition, np.float32(yes), np.float32(no))


def _nonzero(values: np.ndarray) -> np.ndarray:
    return np.where(np.abs(values) < _TINY, np.float32(_TINY), values)


# ---------------------------------------------------------------------------------------------------------------------
# Solids. Each is convex, so a line meets it in one interval [near, far]: a picture takes `near`, a shadow any overlap.


@dataclass(frozen=True)
class _Box:
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    turn: tuple[float, float]  # cos and sin of its rotation about the vertical

    @property
    def radius(self) -> float:
        return sqrt(_dot(self.half, self.half))

    def local(self, vector) -> tuple:
        cos, sin = self.turn
        return vector[0] * cos - vector[2] * sin, vector[1], vector[0] * sin + vector[2] * cos

    def slabs(self, origin, direction) -> tuple[list, list]:
        nears, fars = [], []
        for o, d, half in zip(origin, direction, self.half, strict=True):
            inverse = 1.0 / _nonzero(d)
            first, second = (-half - o) * inverse, (half - o) * inverse
            nears.append(np.minimum(first, second))
            fars.append(np.maximum(first, second))
        return nears, fars

    def interval(self, origin, direction) -> tuple[np.ndarray, np.ndarray]:
        offset = _minus(origin, self.centre)
        nears, fars = self.slabs(self.local(offset), self.local(direction))
        return _largest(nears), _smallest(fars)

    def surface(self, point: list) -> tuple[list, tuple]:
        """Outward normals in the world and the two texture coordinates at points (n,) of the surface."""
        x, y, z = self.local(_minus(point, self.centre))
        depth = _minus((np.abs(x), np.abs(y), np.abs(z)), self.half)  # about 0 on the face that was hit
        on_y = (depth[1] >= depth[0]) & (depth[1] >= depth[2])
        on_x = ~on_y & (depth[0] >= depth[2])
        on_z = ~on_y & ~on_x
        nx, ny, nz = (_pick(p < 0, -1.0, 1.0) * on for p, on in ((x, on_x), (y, on_y), (z, on_z)))
        cos, sin = self.turn
        return [nx * cos + nz * sin, ny, nz * cos - nx * sin], (np.where(on_x, z, x), np.where(on_y, z, y))


@dataclass(frozen=True)
class _Ball:
    centre: tuple[float, float, float]
    radius: float

    def interval(self, origin, direction) -> tuple[np.ndarray, np.ndarray]:
        offset = _minus(origin, self.centre)
        a, b = _dot(direction, direction), _dot(direction, offset)
        return _roots(a, b, _dot(offset, offset) - self.radius * self.radius)

    def surface(self, point: list) -> tuple[list, tuple]:
        offset = _minus(point, self.centre)
        length = np.sqrt(_dot(offset, offset))  # the radius but for rounding, which would show in the normal's length
        return [part / length for part in offset], (offset[0], offset[1])


@dataclass(frozen=True)
class _Cylinder:
    """Upright, with flat ends."""

    centre: tuple[float, float, float]
    round: float
    half: float

    @property
    def radius(self) -> float:
        return sqrt(self.round * self.round + self.half * self.half)

    def interval(self, origin, direction) -> tuple[np.ndarray, np.ndarray]:
        ox, oy, oz = _minus(origin, self.centre)
        dx, dy, dz = direction
        near, far = _roots(dx * dx + dz * dz, dx * ox + dz * oz, ox * ox + oz * oz - self.round * self.round)
        inverse = 1.0 / _nonzero(dy)
        first, second = (-self.half - oy) * inverse, (self.half - oy) * inverse
        return np.maximum(near, np.minimum(first, second)), np.minimum(far, np.maximum(first, second))

    def surface(self, point: list) -> tuple[list, tuple]:
        x, y, z = _minus(point, self.centre)
        length = np.sqrt(x * x + z * z)
        end = np.abs(y) - self.half > length - self.round
        scale = ~end / np.maximum(length, np.float32(_TINY))
        normal = [x * scale, _pick(y < 0, -1.0, 1.0) * end, z * scale]
        return normal, (np.where(end, x, x - z), np.where(end, z, y))


_Solid = _Box | _Ball | _Cylinder


def _roots(a, b, c) -> tuple[np.ndarray, np.ndarray]:
    """The interval where a t^2 + 2 b t + c < 0, or an empty one (near > far)."""
    square = b * b - a * c
    root = np.sqrt(np.maximum(square, 0.0))
    inverse = 1.0 / np.maximum(a, np.float32(_TINY * _TINY))
    meets = square > 0
    return np.where(meets, (-b - root) * inverse, np.float32(1.0)), (root - b) * inverse * meets


def _largest(parts: list) -> np.ndarray:
    return np.maximum(np.maximum(parts[0], parts[1]), parts[2])


def _smallest(parts: list) -> np.ndarray:
    return np.minimum(np.minimum(parts[0], parts[1]), parts[2])


# ---------------------------------------------------------------------------------------------------------------------
# Things: what stands in the room. The first six are the room's own surfaces, numbered 2 * axis + (1 on the high side).

_ROOM_CLASSES = [WALL, WALL, FLOOR, CEILING, WALL, WALL]


@dataclass(frozen=True)
class _Patch:
    """A rectangle painted on a surface of the room."""

    number: int
    surface: int
    low: tuple[float, float]
    high: tuple[float, float]


@dataclass
class _Things:
    classes: list[int] = field(default_factory=lambda: list(_ROOM_CLASSES))
    patches: list[_Patch] = field(default_factory=list)
    solids: list[tuple[int, _Solid]] = field(default_factory=list)

    def add(self, category: int, *solids: _Solid) -> None:
        self.solids += [(len(self.classes), solid) for solid in solids]
        self.classes.append(category)

    def paint(self, category: int, surface: int, low: tuple[float, float], high: tuple[float, float]) -> None:
        self.patches.append(_Patch(len(self.classes), surface, low, high))
        self.classes.append(category)


def _draw_things(draws: _Draws, room: _Room, camera: _Camera) -> _Things:
    things = _Things()
    _draw_rug(draws, room, things)
    for surface in (5, 0, 1):
        _draw_wall(draws, room, things, surface)
    taken: list[tuple[float, float, float]] = [(camera.position[0], camera.position[2], 0.9)]
    for _ in range(draws.integer(4, 7)):
        _draw_object(draws, room, camera, things, taken)
    return things


def _draw_rug(draws: _Draws, room: _Room, things: _Things) -> None:
    """A rug is floor by class, and a thing of its own by its boundary and colour."""
    x, z = draws.uniform(room.low[0], room.high[0] * 0.3), draws.uniform(0.3, 0.6) * room.high[2]
    size = draws.uniform(1.0, 2.2), draws.uniform(0.8, 2.0)
    if draws.chance(0.5):
        things.paint(FLOOR, 2, (x, z), (x + size[0], z + size[1]))


def _draw_wall(draws: _Draws, room: _Room, things: _Things, surface: int) -> None:
    """Up to three of a door, pictures and windows beside each other; doors and pictures are panels."""
    axis = surface // 2
    length = room.high[2] if axis == 0 else room.high[0] - room.low[0]
    start = 0.0 if axis == 0 else room.low[0]
    slots = int(length / 2.0)
    for slot in range(slots):
        left = start + length * slot / slots + draws.uniform(0.1, 0.5)
        size, bottom, top = draws.uniform(0.7, 1.3), draws.uniform(0.9, 1.3), draws.uniform(1.7, 2.2)
        kind = draws.uniform()
        if kind < 0.2:
            things.paint(PANEL, surface, (left, 0.0), (left + 0.7 * size + 0.3, top - 0.1))
        elif kind < 0.5:
            things.paint(PANEL, surface, (left, bottom), (left + size, top))
        elif kind < 0.7:
            things.paint(WINDOW, surface, (left, bottom - 0.1), (left + size, top + 0.1))


def _draw_object(draws: _Draws, room: _Room, camera: _Camera, things: _Things, taken: list) -> None:
    """Put a box, table, ball or column on a free place of the floor in view; five tries."""
    kind = (BOX, TABLE, BALL, COLUMN)[draws.integer(0, 3)]
    size, tall, turn = draws.uniform(), draws.uniform(), draws.rotation(0.4)
    extent = {BOX: 0.35 + 0.35 * size, TABLE: 0.55 + 0.3 * size, BALL: 0.18 + 0.3 * size, COLUMN: 0.15 + 0.25 * size}
    radius = extent[kind]
    for _ in range(5):
        depth, side = draws.uniform(1.6, 0.95 * room.high[2]), draws.uniform(-0.5, 0.5)
        flat = [camera.position[i] + depth * (camera.forward[i] + side * camera.right[i]) for i in (0, 2)]
        x = min(max(flat[0], room.low[0] + radius), room.high[0] - radius)
        z = min(max(flat[1], radius), room.high[2] - radius)
        if all(_apart(x - a, z - b, radius + r) for a, b, r in taken):
            taken.append((x, z, radius))
            _add_object(draws, room, things, kind, (x, z), size, tall, turn)
            return


def _apart(x: float, z: float, least: float) -> bool:
    return x * x + z * z > least * least


def _add_object(
    draws: _Draws, room: _Room, things: _Things, kind: int, at: tuple, size: float, tall: float, turn
) -> None:
    x, z = at
    top = None
    if kind == BOX:
        half = (0.22 + 0.26 * size, 0.15 + 0.4 * tall * tall, 0.22 + 0.2 * size)
        things.add(BOX, _Box((x, half[1], z), half, turn))
        top = 2.0 * half[1]
    elif kind == TABLE:
        top, half = 0.45 + 0.35 * tall, (0.4 + 0.22 * size, 0.035, 0.32 + 0.18 * size)
        leg = _Cylinder((x, 0.5 * top - 0.04, z), 0.05 + 0.04 * size, 0.5 * top - 0.04)
        things.add(TABLE, _Box((x, top - half[1], z), half, turn), leg)
    elif kind == BALL:
        radius = 0.18 + 0.3 * size
        things.add(BALL, _Ball((x, radius, z), radius))
    else:
        half = 0.5 * room.high[1] if tall < 0.3 else 0.2 + 0.6 * tall
        things.add(COLUMN, _Cylinder((x, half, z), 0.12 + 0.2 * size, half))
    if top is not None and draws.chance(0.4):
        _add_small(draws, things, (x, top, z))


def _add_small(draws: _Draws, things: _Things, base: tuple[float, float, float]) -> None:
    """A small box, ball or column on top of a box or table."""
    x, y, z = base
    kind, size = draws.integer(0, 2), draws.uniform(0.1, 0.2)
    if kind == 0:
        things.add(BOX, _Box((x, y + size, z), (size, size, size), draws.rotation(0.4)))
    elif kind == 1:
        things.add(BALL, _Ball((x, y + size, z), size))
    else:
        things.add(COLUMN, _Cylinder((x, y + 1.3 * size, z), 0.6 * size, 1.3 * size))


# ---------------------------------------------------------------------------------------------------------------------
# The picture.


class _Frame:
    """Per pixel: depth, the thing that is seen, its world normal and its texture coordinates."""

    def __init__(self, camera: _Camera, room: _Room) -> None:
        self.camera = camera
        self.room = room
        self.rays = camera.rays()
        self._cast_room(room)

    def _cast_room(self, room: _Room) -> None:
        exits = []
        for axis, ray in enumerate(self.rays):
            origin = self.camera.position[axis]
            exits.append(_pick(ray > 0, room.high[axis] - origin, room.low[axis] - origin) / ray)
        self.depth = _smallest(exits)
        on = [exits[1] <= np.minimum(exits[0], exits[2]), exits[0] < exits[2]]
        axis = np.where(on[0], 1, np.where(on[1], 0, 2))
        up = [ray > 0 for ray in self.rays]
        high = np.where(on[0], up[1], np.where(on[1], up[0], up[2]))
        self.thing = (2 * axis + high).astype(np.int32)
        inward = _pick(high, -1.0, 1.0)
        self.normal = [inward * (axis == i) for i in range(3)]
        x, y, z = self.points()
        self.u = np.where(axis == 0, z, x)
        self.v = np.where(axis == 1, z, y)

    def points(self) -> list[np.ndarray]:
        """World positions of what is seen."""
        return _along(self.camera.position, self.depth, self.rays)

    def paint(self, patch: _Patch) -> None:
        """Give a rectangle of a room surface to a patch. To be called before `cast`, since patches have no depth."""
        inside = self.thing == patch.surface
        inside &= (self.u > patch.low[0]) & (self.u < patch.high[0])
        inside &= (self.v > patch.low[1]) & (self.v < patch.high[1])
        self.thing[inside] = patch.number

    def cast(self, number: int, solid: _Solid) -> None:
        """Draw a solid where it is nearer than what is there."""
        place = self.camera.window(solid.centre, solid.radius)
        rays = [ray[place] for ray in self.rays]
        if rays[0].size == 0:
            return
        near, far = solid.interval(self.camera.position, rays)
        hit = (near < far) & (near > 0.1) & (near < self.depth[place])
        if not hit.any():
            return
        depth = near[hit]
        point = _along(self.camera.position, depth, [ray[hit] for ray in rays])
        normal, (u, v) = solid.surface(point)
        targets = (self.depth, self.thing, self.u, self.v, *self.normal)
        for target, value in zip(targets, (depth, number, u, v, *normal), strict=True):
            target[place][hit] = value


def _choose(draws: _Draws, classes: list[int], thing: np.ndarray) -> tuple[list[int], list[int]]:
    """Which visible things stand out (one, at times two), and which is unlabelled (in a quarter of the scenes).

    Every visible thing but the room and its windows is as likely, so shape, class and place say nothing.
    """
    counts = np.bincount(thing.ravel(), minlength=len(classes)).tolist()
    least = thing.size // 200  # half a percent of the image, 61 pixels at 96 x 128: enough to be seen
    free = [i for i in range(len(_ROOM_CLASSES), len(classes)) if classes[i] != WINDOW and counts[i] > least]
    picks = [draws.uniform() for _ in range(3)]
    wanted = (bool(free), draws.chance(0.25) and len(free) > 3, draws.chance(0.25) and len(free) > 2)
    first, second, third = (
        [free.pop(int(pick * len(free)))] if want else [] for pick, want in zip(picks, wanted, strict=True)
    )
    return first + second, third


def _shade(draws: _Draws, things: _Things, frame: _Frame, salient: list[int]) -> np.ndarray:
    """The image (3, H, W): sqrt(texture x light), a sky in windows, a little noise, in steps of 1/255."""
    texture = _texture(draws, things.classes, frame, salient)
    light = _light(draws, things, frame)
    sky = _sky(draws, frame)
    window = np.array([c == WINDOW for c in things.classes])[frame.thing]
    pixels = np.arange(frame.depth.size, dtype=np.uint32).reshape(frame.depth.shape)
    noise = _mix32_array(pixels * np.uint32(0x9E3779B1) + np.uint32(draws.key32)) >> np.uint32(8)
    grain = noise.astype(np.float32) * (0.04 * 2.0**-24) - 0.02
    image = np.empty((3, *frame.depth.shape), dtype=np.float32)
    for channel, colour in enumerate(texture):
        lit = np.where(window, sky, colour * light * draws.uniform(0.92, 1.08))
        # sqrt is the display's gamma of 2
        value = np.minimum(np.maximum(np.sqrt(lit) + grain, 0.0), 1.0)
        image[channel] = np.floor(value * 255.0 + 0.5) / 255.0
    return image


def _texture(draws: _Draws, classes: list[int], frame: _Frame, salient: list[int]) -> list[np.ndarray]:
    """Linear reflectance, three (H, W): each thing mixes two colours of its hue by a pattern in its own coordinates."""
    palette = draws.uniform()
    odd = palette + draws.uniform(0.33, 0.67)
    rows = [_paint_row(draws, number, palette, odd if number in salient else None) for number in range(len(classes))]
    table = np.array(rows, dtype=np.float32)
    looked_up = np.take(table.T, frame.thing, axis=1)
    pattern, frequency = looked_up[0], looked_up[1]
    column = np.floor(frame.u * frequency).astype(np.int32)
    row = np.floor(frame.v * frequency).astype(np.int32)
    cell = column * np.int32(73856093) + row * np.int32(19349663) + frame.thing * np.int32(83492791)
    hashed = _mix32_array(cell.view(np.uint32) + np.uint32(draws.key32)) >> np.uint32(8)
    mix = hashed.astype(np.float32) * 2.0**-24 * (pattern == NOISE)
    mix += (column + row & 1) * (pattern == CHECKER)
    mix += (column & 1) * (pattern == STRIPES)
    colours = []
    for channel in range(3):
        first, second = looked_up[2 + channel], looked_up[5 + channel]
        value = first + mix * (second - first)
        colours.append(value * value)
    return colours


def _paint_row(draws: _Draws, number: int, palette: float, odd: float | None) -> list[float]:
    """Pattern, cells a metre, and two display colours of one thing.

    Lightness and strength of colour come from the same ranges whether the thing stands out or not: only its hue tells.
    """
    room = number < len(_ROOM_CLASSES)
    hue = (palette if odd is None else odd) + draws.uniform(-0.07, 0.07)
    chroma = draws.uniform(0.06, 0.18) if room else draws.uniform(0.25, 0.45)
    luma = draws.uniform(0.5, 0.8) if room else draws.uniform(0.35, 0.7)
    contrast = draws.uniform(0.08, 0.25)
    other = luma - contrast if luma > 0.5 else luma + contrast
    frequency = draws.uniform(1.0, 4.0) if room else draws.uniform(4.0, 11.0)
    pattern = draws.integer(PLAIN, NOISE)
    return [float(pattern), frequency, *_colour(hue, chroma, luma), *_colour(hue, chroma, other)]


def _colour(hue: float, chroma: float, luma: float) -> list[float]:
    """A display colour of the given luma (before clipping); hue counts turns of the RGB hexagon."""
    corners = [min(max(abs((hue + shift) % 1.0 * 6.0 - 3.0) - 1.0, 0.0), 1.0) for shift in (0.0, 2.0 / 3.0, 1.0 / 3.0)]
    grey = _dot((0.299, 0.587, 0.114), corners)
    return [min(max(luma + chroma * (corner - grey), 0.02), 1.0) for corner in corners]


def _light(draws: _Draws, things: _Things, frame: _Frame) -> np.ndarray:
    """Light (H, W): ambient, more from above, plus a point light below the ceiling that solids shade."""
    share = [draws.uniform(0.2, 0.8) for _ in range(2)]
    room = frame.room
    lamp = [room.low[0] + share[0] * (room.high[0] - room.low[0]), 0.85 * room.high[1], share[1] * room.high[2]]
    power = draws.uniform(0.9, 1.4)
    point = frame.points()
    towards = _minus(lamp, point)
    square = _dot(towards, towards)
    facing = np.maximum(_dot(towards, frame.normal), 0.0) / np.sqrt(square)
    shaded = np.zeros(square.shape, dtype=bool)
    for _, solid in things.solids:
        near, far = solid.interval(point, towards)
        # 0.01 of the way to the lamp, 1 to 8 cm: a point does not shade itself, whatever its rounding
        shaded |= (near < far) & (far > 0.01) & (near < 1.0)
    direct = np.where(shaded, np.float32(0.0), facing * power / (1.0 + 0.06 * square))
    return 0.34 + 0.1 * frame.normal[1] + direct


def _sky(draws: _Draws, frame: _Frame) -> np.ndarray:
    """Linear grey (H, W) of the view through windows: bright above the horizon, darker ground below it."""
    bright = draws.uniform(0.6, 0.95)
    slope = frame.rays[1]
    above = np.minimum(bright + 0.5 * slope, 1.0)
    return np.where(slope > 0, above, 0.5 * bright * (1.0 + np.maximum(slope, np.float32(-1.0))))


# ---------------------------------------------------------------------------------------------------------------------
# The labels.


def _labels(
    classes: list[int], frame: _Frame, image: np.ndarray, salient: list[int], unlabelled: list[int]
) -> dict[str, np.ndarray]:
    number = len(classes)
    valid = np.array([c != WINDOW for c in classes])[frame.thing]
    void = np.array([i in unlabelled for i in range(number)])
    stands_out = np.array([i in salient for i in range(number)], dtype=np.int64)
    semantics = np.array(classes, dtype=np.int64)
    semantics[void] = stands_out[void] = IGNORE_INDEX
    camera = frame.camera
    normals = [_dot(axis, frame.normal) * valid for axis in (camera.right, camera.down, camera.forward)]
    return {
        "image": image,
        "semseg": semantics[frame.thing],
        "depth": (frame.depth * valid)[None],
        "normals": np.stack(normals),
        "saliency": stands_out[frame.thing],
        "edge": _edges(frame.thing, void[frame.thing])[None],
    }


def _edges(thing: np.ndarray, void: np.ndarray) -> np.ndarray:
    edge = np.zeros(thing.shape, dtype=np.float32)
    edge[:, :-1] = thing[:, :-1] != thing[:, 1:]
    edge[:-1] = np.maximum(edge[:-1], thing[:-1] != thing[1:])
    ignored = void.copy()
    ignored[:, :-1] |= void[:, 1:]
    ignored[:-1] |= void[1:]
    edge[ignored] = IGNORE_INDEX
    return edge
