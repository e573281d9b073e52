"""A small detection set of real trees, from the air.

The wheel ``deepforest`` 2.1.0 (MIT, 20.6 MB) carries aerial photographs of the
National Ecological Observatory Network with boxes drawn by hand (Weinstein et
al. 2020, doi:10.1111/2041-210X.13472). pip downloads it; it is never
installed or imported. Tiles of 256 x 256 pixels of one picture are to train
on, those of a second one to validate, and those of a third one, of another
site, are a shift of domain.

Usage: python demo/trees.py ROOT
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np

__all__ = ['write_trees']

WHEEL = 'deepforest==2.1.0'
PICTURES = {
    'train': '2019_YELL_2_528000_4978000_image_crop2',
    'val': '2019_YELL_2_541000_4977000_image_crop',
    'shift': 'OSBS_029',
}
TILE = 256
# of a box that a tile cuts, the least that has to be seen
SEEN = 0.5


def write_trees(root: str | Path) -> Path:
    """Write the trees in COCO format.

    The files are ``{train,val,shift}/*.png`` and
    ``annotations/{train,val,shift}.json``, with the category 'Tree': 90, 20
    and 4 tiles. They appear in one move; a set that is there stays.

    Args:
        root (str | Path): Folder of the set.

    Returns:
        Path: The folder of the set.
    """
    root = Path(root)
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            beside = Path(folder, 'trees')
            (beside / 'annotations').mkdir(parents=True)
            with zipfile.ZipFile(_wheel(Path(folder))) as wheel:
                for split, name in PICTURES.items():
                    _write_split(
                        wheel, beside, split, f'deepforest/data/{name}'
                    )
            beside.replace(root)
    return root


def _wheel(folder: Path) -> Path:
    command = (sys.executable, '-m', 'pip', 'download', '--no-deps', '-q')
    subprocess.run([*command, WHEEL, '-d', str(folder)], check=True)
    (wheel,) = folder.glob('*.whl')
    return wheel


def _write_split(
    wheel: zipfile.ZipFile, root: Path, split: str, name: str
) -> None:
    """Write the tiles of a picture and their annotations."""
    (root / split).mkdir()
    pixels = np.frombuffer(wheel.read(f'{name}.png'), np.uint8)
    picture = cv2.imdecode(pixels, cv2.IMREAD_COLOR)
    boxes = _boxes(wheel.read(f'{name}.xml').decode())
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    height, width = picture.shape[:2]
    for top in _starts(height):
        for left in _starts(width):
            number = len(images)
            file_name = f'{number:03d}.png'
            tile = picture[top : top + TILE, left : left + TILE]
            cv2.imwrite(str(root / split / file_name), tile)
            images.append(
                dict(id=number, file_name=file_name, width=TILE, height=TILE)
            )
            corner = np.array([left, top] * 2)
            seen = np.clip(boxes - corner, 0, TILE)
            share = _areas(seen) / _areas(boxes)
            for box in seen[share >= SEEN]:
                x, y, right, bottom = map(int, box)
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number,
                        category_id=0,
                        bbox=[x, y, right - x, bottom - y],
                        area=(right - x) * (bottom - y),
                        iscrowd=0,
                    )
                )
    content = dict(images=images, annotations=annotations)
    content['categories'] = [dict(id=0, name='Tree')]
    path = root / 'annotations' / f'{split}.json'
    path.write_text(json.dumps(content))


def _starts(size: int) -> list[int]:
    """Return where tiles start: they cover all, and may overlap a little."""
    count = -(-size // TILE) if size % TILE > TILE // 2 else size // TILE
    return [round(x) for x in np.linspace(0, size - TILE, count)]


def _boxes(text: str) -> Any:
    """Return boxes (N, 4) of left, top, right and bottom."""
    return np.array(
        [
            [
                float(box.findtext(x, ''))
                for x in ('xmin', 'ymin', 'xmax', 'ymax')
            ]
            for box in ElementTree.fromstring(text).iter('bndbox')
        ]
    )


def _areas(boxes: Any) -> Any:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def main() -> None:
    """Write the set that the command line asks for."""
    parser = argparse.ArgumentParser(description='Write the trees.')
    parser.add_argument('root', type=Path, help='folder of the set')
    print(write_trees(parser.parse_args().root))


if __name__ == '__main__':
    main()
