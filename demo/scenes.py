"""Draw what raw and averaged weights find on a few pictures, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mmdet_ema.cli import plot

SCENES = 5
SCORE = 0.3
IOU = 0.5  # of a box that is right

Found = Dict[str, npt.NDArray[np.float64]]
"""Boxes (N, 5) of left, top, right, bottom and label, by file name."""


def draw(
    data: Path, found: dict[str, Found], path: Path, what: str = 'digits'
) -> None:
    """Draw a row of scenes for each set of weights into a picture.

    Args:
        data: The detection set.
        found: What each set of weights found on the validation scenes.
        path: Where to.
        what: What is to be found: the labels of digits are drawn. Defaults to
            'digits'.
    """
    truth, labelled = _truth(data), what == 'digits'
    # the first ones: nobody chose them
    names = sorted(truth)[:SCENES]
    figure = Figure(figsize=(2 * SCENES, 4.6), layout='constrained')
    rows = figure.subplots(len(found), SCENES, squeeze=False)
    for (weights, boxes), row in zip(found.items(), rows):
        for name, axes in zip(names, row):
            pixels = cv2.imread(str(data / 'val' / name))
            axes.imshow(pixels[..., ::-1])  # OpenCV has blue first
            axes.set(xticks=[], yticks=[])
            missed = list(truth[name])
            for box in boxes.get(name, ()):
                hit = next((x for x in missed if _same(box, x)), None)
                if hit is not None:
                    missed = [x for x in missed if x is not hit]
                _frame(axes, box, 'red' if hit is None else 'lime', labelled)
            for box in missed:
                _frame(axes, box, 'yellow', labelled, ':')
        row[0].set_ylabel(f'{weights} weights')
    figure.suptitle(
        f'The last checkpoint on validation scenes: {what} found (green), '
        'wrong (red), missed (dotted)'
    )
    plot.write(figure, path)


def _truth(data: Path) -> Found:
    text = (data / 'annotations' / 'val.json').read_text()
    annotations: dict[str, Any] = json.loads(text)
    names = {
        image['id']: image['file_name'] for image in annotations['images']
    }
    boxes: dict[str, list[list[float]]] = {name: [] for name in names.values()}
    for item in annotations['annotations']:
        x, y, w, h = item['bbox']
        row = [x, y, x + w, y + h, item['category_id']]
        boxes[names[item['image_id']]].append(row)
    return {name: np.array(rows) for name, rows in boxes.items()}


def _same(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> bool:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:4], b[2:4])
    common = np.prod(np.clip(high - low, 0, None))
    areas = [np.prod(box[2:4] - box[:2]) for box in (a, b)]
    return bool(a[4] == b[4] and common > IOU * (sum(areas) - common))


def _frame(
    axes: Any, box: Any, colour: str, labelled: bool, style: str = '-'
) -> None:
    left, top, right, bottom, label = box
    corner, size = (left, top), (right - left, bottom - top)
    look = dict(fill=False, edgecolor=colour, linestyle=style)
    axes.add_patch(Rectangle(corner, *size, **look))
    if labelled:
        axes.text(left, top - 1, f'{label:.0f}', color=colour, fontsize=7)
