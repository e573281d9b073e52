"""A small detection set of real handwritten digits, written in seconds.

scikit-learn ships 1,797 scans of handwritten digits, 8 x 8 pixels each
(Alpaydin and Kaynak, 1998, doi:10.24432/C50P49), so nothing is downloaded.
The scans stand at random sizes and places on noisy grey scenes. No scan is
seen both in training and in validation.

Usage: python demo/digits.py ROOT [--train N] [--val N] [--size PX] [--seed N]
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

__all__ = ['write_digits']

SCANS = {'train': (0, 1400), 'val': (1400, 1797)}
CATEGORIES = [dict(id=digit, name=str(digit)) for digit in range(10)]
LOWEST = dict(train_scenes=1, val_scenes=1, size=64, seed=0)
DIGITS_PER_SCENE = (4, 7)
HEIGHT_SHARE = (0.2, 0.4)  # height of a scan over the height of its scene
GREY = (30, 100)
NOISE = 12
INK = (80, 150)  # what full ink adds to the grey
PLACE_TRIES = 20

Pixels = npt.NDArray[np.float64]


class _Box(NamedTuple):
    """Left, top, width and height in pixels, as COCO has them."""

    x: int
    y: int
    w: int
    h: int

    def overlaps(self, other: _Box) -> bool:
        beside = self.x >= other.x + other.w or other.x >= self.x + self.w
        below = self.y >= other.y + other.h or other.y >= self.y + self.h
        return not (beside or below)


class _Digit(NamedTuple):
    label: int
    box: _Box


def write_digits(
    root: str | Path,
    train_scenes: int = 800,
    val_scenes: int = 200,
    size: int = 128,
    seed: int = 0,
    val_scans: tuple[int, int] = SCANS['val'],
) -> Path:
    """Write the digits detection set in COCO format.

    The files are ``train/*.png``, ``val/*.png`` and
    ``annotations/{train,val}.json``, with ten categories named '0' to '9'.
    They appear in one move: an interrupted run leaves no half-written set. The
    same arguments write the same bytes. A complete set of the same arguments
    stays as it is.

    Args:
        root (str | Path): Folder of the set.
        train_scenes (int): Number of training scenes. Defaults to 800.
        val_scenes (int): Number of validation scenes. Defaults to 200.
        size (int): Width and height of a scene in pixels. Defaults to 128.
        seed (int): Seed of sizes, places and noise. Defaults to 0.
        val_scans (tuple[int, int]): First scan of the validation and the one
            after its last, for a part that is held out. Defaults to
            (1400, 1797).

    Returns:
        Path: The folder of the set.

    Raises:
        ValueError: If a number is out of range, or if ``root`` holds anything
            but a complete set of the same arguments.

    Example:
        >>> write_digits('data/digits', train_scenes=80, val_scenes=20)
        PosixPath('data/digits')
    """
    info: dict[str, Any] = dict(
        train_scenes=train_scenes, val_scenes=val_scenes, size=size, seed=seed
    )
    _check_numbers(info)
    if tuple(val_scans) != SCANS['val']:
        first, end = val_scans
        if not SCANS['val'][0] <= first <= end - 10 <= SCANS['val'][1] - 10:
            raise ValueError(
                f'val_scans must be at least 10 scans within {SCANS["val"]}, '
                f'got {val_scans!r}'
            )
        # sets that are there already do not have it
        info['val_scans'] = [first, end]
    root = Path(root)
    if not _is_complete(root, info):
        _check_free(root)
        _write_in_one_move(root, info)
    return root


def _check_numbers(info: dict[str, Any]) -> None:
    for name, number in info.items():
        if not isinstance(number, int) or number < LOWEST[name]:
            raise ValueError(
                f'{name} must be an integer of at least {LOWEST[name]}, '
                f'got {number!r}'
            )


def _is_complete(root: Path, info: dict[str, Any]) -> bool:
    return all(
        _read_info(_annotation_file(root, split)) == info
        and len(list((root / split).glob('*.png'))) == info[f'{split}_scenes']
        for split in SCANS
    )


def _annotation_file(root: Path, split: str) -> Path:
    return root / 'annotations' / f'{split}.json'


def _read_info(file: Path) -> Any:
    try:
        return json.loads(file.read_text())['info']
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _check_free(root: Path) -> None:
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise ValueError(
            f'{str(root)!r} holds something else than a complete set of these '
            'arguments: remove it, or name a new or an empty folder'
        )


def _write_in_one_move(root: Path, info: dict[str, Any]) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix='.digits-') as d:
        folder = Path(d, 'digits')
        (folder / 'annotations').mkdir(parents=True)
        for split in SCANS:
            _write_split(folder, split, info)
        folder.replace(root)


def _write_split(folder: Path, split: str, info: dict[str, Any]) -> None:
    """Write the scenes of one split and their annotations."""
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(info[f'{split}_scenes']):
        scene, digits = _draw_scene(split, image_id, info)
        images.append(_write_image(folder / split, image_id, scene))
        for digit in digits:
            number = len(annotations) + 1
            annotations.append(_annotation(number, image_id, digit))
    content = dict(info=info, images=images, annotations=annotations)
    content['categories'] = CATEGORIES
    _annotation_file(folder, split).write_text(json.dumps(content))


def _draw_scene(
    split: str, image_id: int, info: dict[str, Any]
) -> tuple[Pixels, list[_Digit]]:
    rng = np.random.default_rng(
        [info['seed'], list(SCANS).index(split), image_id]
    )
    shape = (info['size'], info['size'])
    scene = rng.uniform(*GREY) + rng.normal(0, NOISE, shape)
    digits: list[_Digit] = []
    first, end = info.get(f'{split}_scans', SCANS[split])
    for label, scan in _pick_scans(rng, first, end):
        ink = _resized_ink(rng, scan, info['size'])
        box = _free_place(rng, ink, scene, digits)
        if box:
            scene[_area(box)] += rng.uniform(*INK) * ink
            digits.append(_Digit(label, box))
    return scene, digits


def _pick_scans(
    rng: np.random.Generator, first: int, end: int
) -> list[tuple[int, Pixels]]:
    labels, pixels = _load_scans(first, end)
    number = rng.integers(*DIGITS_PER_SCENE, endpoint=True)
    picked = rng.choice(len(labels), number, replace=False)
    return [(int(labels[i]), pixels[i]) for i in picked]


@functools.lru_cache(maxsize=None)
def _load_scans(first: int, end: int) -> tuple[npt.NDArray[np.int64], Pixels]:
    scans = load_digits()
    return scans.target[first:end], scans.images[first:end]


def _resized_ink(rng: np.random.Generator, scan: Pixels, size: int) -> Pixels:
    """Cut a scan to its ink and give it a random size; values in 0..1."""
    y, x = np.nonzero(scan)
    ink = scan[y.min() : y.max() + 1, x.min() : x.max() + 1] / scan.max()
    scale = rng.uniform(*HEIGHT_SHARE) * size / len(scan)
    resized = cv2.resize(ink, None, fx=scale, fy=scale)
    return np.asarray(resized, dtype=np.float64)


def _free_place(
    rng: np.random.Generator,
    ink: Pixels,
    scene: Pixels,
    digits: list[_Digit],
) -> _Box | None:
    """A random place that overlaps no digit, or None where none is found."""
    (h, w), (height, width) = ink.shape, scene.shape
    for _ in range(PLACE_TRIES):
        x = int(rng.integers(width - w, endpoint=True))
        y = int(rng.integers(height - h, endpoint=True))
        box = _Box(x, y, w, h)
        if not any(box.overlaps(digit.box) for digit in digits):
            return box
    return None


def _area(box: _Box) -> tuple[slice, slice]:
    return slice(box.y, box.y + box.h), slice(box.x, box.x + box.w)


def _write_image(folder: Path, image_id: int, scene: Pixels) -> dict[str, Any]:
    name = f'{image_id:05d}.png'
    _, png = cv2.imencode('.png', scene.clip(0, 255).astype(np.uint8))
    (folder / name).write_bytes(png.tobytes())
    height, width = scene.shape
    return dict(id=image_id, file_name=name, width=width, height=height)


def _annotation(number: int, image_id: int, digit: _Digit) -> dict[str, Any]:
    return dict(
        id=number,
        image_id=image_id,
        category_id=digit.label,
        bbox=list(digit.box),
        area=digit.box.w * digit.box.h,
        iscrowd=0,
    )


def main() -> None:
    """Write the set that the command line asks for."""
    parser = argparse.ArgumentParser(description='Write the digits set.')
    parser.add_argument('root', type=Path, help='folder of the set')
    parser.add_argument('--train', type=int, default=800, metavar='N')
    parser.add_argument('--val', type=int, default=200, metavar='N')
    parser.add_argument('--size', type=int, default=128, metavar='PX')
    parser.add_argument('--seed', type=int, default=0, metavar='N')
    args = parser.parse_args()
    try:
        write_digits(args.root, args.train, args.val, args.size, args.seed)
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
