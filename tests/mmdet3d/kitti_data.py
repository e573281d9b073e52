"""A small generated data set in KITTI's format: clouds, images and labels.

Boxes the size of cars, cyclists and pedestrians stand on a plane. Their
visible faces and the ground give the points, their painted faces the images;
labels and calibration follow KITTI's development kit. mmdet3d's own
``tools/create_data.py`` then makes the infos and the database of objects that
its data sets read. The same arguments write the same scenes.

Usage: python tests/mmdet3d/kitti_data.py ROOT [--train N] [--val N] [--seed N]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ['write_kitti']

# length, width and height in metres, colour (BGR), how many in a scene
CLASSES = {
    'Car': ((3.9, 1.6, 1.56), (40, 40, 200), (2, 3)),
    'Cyclist': ((1.76, 0.6, 1.73), (40, 200, 40), (0, 1)),
    'Pedestrian': ((0.8, 0.6, 1.73), (200, 40, 40), (0, 1)),
}
FORWARD, SIDEWAYS = (7.0, 18.0), (-6.0, 6.0)
GAP = 0.5  # metres between the circles around two objects
GROUND = -1.73  # height of the ground under the scanner
GROUND_POINTS, FACE_DENSITY = 1500, 40  # the latter in points a square metre
NOISE = 0.02  # of a point, in metres
PLACE_TRIES = 50

WIDTH, HEIGHT, FOCAL = 640, 192, 372.0
CAMERA = np.array(
    [[FOCAL, 0, WIDTH / 2, 0], [0, FOCAL, HEIGHT / 3, 0], [0, 0, 1, 0]]
)
TO_CAMERA = np.array([[0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27]])
CALIBRATION = {
    **{f'P{i}': CAMERA for i in range(4)},
    'R0_rect': np.eye(3),
    'Tr_velo_to_cam': TO_CAMERA,
    'Tr_imu_to_velo': np.eye(3, 4),
}
# The six faces of a box by its corners, the top face last but one.
FACES = [
    *((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4)),
    *((2, 3, 7, 6), (1, 3, 7, 5), (0, 2, 6, 4)),
]

# create_data.py imports itself as `tools`, and waits for 5 seconds before each
# of the four files that it rewrites.
PROGRAM = """
import runpy, sys, time
time.sleep = lambda seconds: None
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""

Numbers = npt.NDArray[np.float64]


class Thing(NamedTuple):
    """An object: its class, place of the middle on the ground and heading."""

    name: str
    x: float
    y: float
    yaw: float

    @property
    def size(self) -> Numbers:
        """Length, width, height."""
        return np.array(CLASSES[self.name][0])

    def corners(self) -> Numbers:
        """Its eight corners before the scanner, z fastest, then y."""
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [0, 2], indexing='ij'))
        local = signs.reshape(3, 8).T * self.size / 2
        cos, sin = np.cos(self.yaw), np.sin(self.yaw)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        return local @ turn + [self.x, self.y, GROUND]

    def apart_from(self, other: Thing) -> bool:
        """Tell whether the circles around the two do not touch."""
        reach = np.hypot(*self.size[:2]) + np.hypot(*other.size[:2])
        distance = np.hypot(self.x - other.x, self.y - other.y)
        return bool(distance > reach / 2 + GAP)


def write_kitti(
    root: str | Path, train: int = 16, val: int = 8, seed: int = 0
) -> Path:
    """Write the set.

    Args:
        root (str | Path): Its folder; files in it are overwritten.
        train (int): Number of training scenes. Defaults to 16.
        val (int): Number of validation scenes. Defaults to 8.
        seed (int): Seed of everything. Defaults to 0.

    Returns:
        Path: The folder.
    """
    root = Path(root).resolve()
    for folder in ('calib', 'image_2', 'label_2', 'planes', 'velodyne'):
        for part in ('training', 'testing'):
            (root / part / folder).mkdir(parents=True, exist_ok=True)
    (root / 'ImageSets').mkdir(exist_ok=True)
    total = train + val
    # the converter wants one test scene at least
    parts = dict(
        train=range(train),
        val=range(train, total),
        test=range(total, total + 1),
    )
    for part, numbers in parts.items():
        text = ''.join(f'{number:06d}\n' for number in numbers)
        (root / 'ImageSets' / f'{part}.txt').write_text(text)
        folder = root / ('testing' if part == 'test' else 'training')
        for number in numbers:
            random = np.random.default_rng([seed, number])
            _write_scene(folder, f'{number:06d}', random)
    _make_infos(root)
    return root


def _write_scene(folder: Path, name: str, random: np.random.Generator) -> None:
    things = _place(random)
    labels = [_label(thing) for thing in things]
    (folder / 'label_2' / f'{name}.txt').write_text(''.join(labels))
    cloud = _cloud(things, random).astype(np.float32)
    (folder / 'velodyne' / f'{name}.bin').write_bytes(cloud.tobytes())
    image = folder / 'image_2' / f'{name}.png'
    cv2.imwrite(str(image), _picture(things, random))
    lines = [
        f'{key}: {" ".join(f"{x:.12e}" for x in value.ravel())}\n'
        for key, value in CALIBRATION.items()
    ]
    (folder / 'calib' / f'{name}.txt').write_text(''.join(lines))
    height = -GROUND + TO_CAMERA[1, 3]
    plane = f'# Plane\nWidth 4\nHeight 1\n0.0 -1.0 0.0 {height:.6f}\n'
    (folder / 'planes' / f'{name}.txt').write_text(plane)


def _place(random: np.random.Generator) -> list[Thing]:
    things: list[Thing] = []
    for name, (_, _, (low, high)) in CLASSES.items():
        for _ in range(random.integers(low, high + 1)):
            for _ in range(PLACE_TRIES):
                x, y = random.uniform(*FORWARD), random.uniform(*SIDEWAYS)
                thing = Thing(name, x, y, random.uniform(-np.pi, np.pi))
                if all(thing.apart_from(other) for other in things):
                    things.append(thing)
                    break
    return things


def _cloud(things: list[Thing], random: np.random.Generator) -> Numbers:
    low, high = (1.0, -9.0), (20.0, 9.0)
    ground = random.uniform(low, high, (GROUND_POINTS, 2))
    clouds = [np.c_[ground, np.full(GROUND_POINTS, GROUND)]]
    for thing in things:
        corners = thing.corners()
        for face in FACES:
            if _is_seen(corners, face):
                clouds.append(_points_on(corners[list(face)], random))
    points = np.concatenate(clouds)
    points = points + random.normal(0, NOISE, points.shape)
    return np.c_[points, random.uniform(0, 1, len(points))]


def _is_seen(corners: Numbers, face: tuple[int, ...]) -> bool:
    """Tell whether the scanner, in the origin, sees the face from outside."""
    middle = corners[list(face)].mean(0)
    return bool((middle - corners.mean(0)) @ middle < 0)


def _points_on(face: Numbers, random: np.random.Generator) -> Numbers:
    first, second = face[1] - face[0], face[3] - face[0]
    area = np.linalg.norm(first) * np.linalg.norm(second)
    share = random.uniform(0, 1, (max(8, int(area * FACE_DENSITY)), 2))
    return face[0] + share @ np.stack([first, second])


def _project(points: Numbers) -> Numbers:
    """Pixels of points that are given before the scanner."""
    pixels = _in_camera(points) @ CAMERA[:, :3].T
    return pixels[:, :2] / pixels[:, 2:]


def _in_camera(points: Numbers) -> Numbers:
    return points @ TO_CAMERA[:, :3].T + TO_CAMERA[:, 3]


def _picture(
    things: list[Thing], random: np.random.Generator
) -> npt.NDArray[np.uint8]:
    image = np.full((HEIGHT, WIDTH, 3), 160.0)
    image[int(CAMERA[1, 2]) :] = 90
    for thing in sorted(things, key=lambda t: -np.hypot(t.x, t.y)):
        corners = thing.corners()
        for shade, face in enumerate(FACES):
            if _is_seen(corners, face):
                pixels = _project(corners[list(face)]).round()
                colour = np.array(CLASSES[thing.name][1]) * (1 - shade / 12)
                cv2.fillPoly(image, [pixels.astype(np.int32)], colour.tolist())
    image += random.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def _label(thing: Thing) -> str:
    pixels = _project(thing.corners()).clip(0, [WIDTH - 1, HEIGHT - 1])
    box = [*pixels.min(0), *pixels.max(0)]
    place = _in_camera(np.array([[thing.x, thing.y, GROUND]]))[0]
    turn = _wrapped(-thing.yaw - np.pi / 2)
    alpha = _wrapped(turn - np.arctan2(place[0], place[2]))
    # truncation and occlusion are left at 0, the easiest
    numbers = [alpha, *box, *thing.size[[2, 1, 0]], *place, turn]
    return f'{thing.name} 0.00 0 {" ".join(f"{x:.6f}" for x in numbers)}\n'


def _wrapped(angle: float) -> float:
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _make_infos(root: Path) -> None:
    """Run mmdet3d's ``tools/create_data.py kitti``."""
    spec = importlib.util.find_spec('mmdet3d')
    if spec is None or spec.origin is None:
        raise SystemExit('mmdet3d is not installed: make setup')
    mim = Path(spec.origin).parent / '.mim'
    words = ['kitti', '--root-path', root, '--out-dir', root, '--with-plane']
    done = subprocess.run(
        [
            *(sys.executable, '-c', PROGRAM),
            *(mim, mim / 'tools' / 'create_data.py', *words),
        ],
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f'create_data.py failed:\n{done.stdout[-4000:]}')


def main() -> None:
    """Read the command line and write the set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('root', type=Path)
    parser.add_argument('--train', type=int, default=16)
    parser.add_argument('--val', type=int, default=8)
    parser.add_argument('--seed', type=int, default=0)
    print(write_kitti(**vars(parser.parse_args())))


if __name__ == '__main__':
    main()
