"""The recipe of a file: from what, and how, it was made.

It is in the file itself, without dates or names of machines: the same recipe
makes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Dict, List, Mapping, MutableMapping, Sequence

from mmdet_ema.errors import CheckpointError
from mmdet_ema.version import __version__

KEY = 'mmdet_ema_recipe'
"""Where it is: in ``meta``, or in the metadata of a safetensors file."""


def make(
    command: str, inputs: Sequence[str], options: Mapping[str, Any]
) -> Dict[str, Any]:
    """Return the recipe of a file that is about to be made.

    ``options`` are what else decides what is made: plain values only.
    """
    return {
        'command': command,
        'version': __version__,
        'inputs': [{'path': x, 'sha256': sha256_of(x)} for x in inputs],
        'options': json.loads(json.dumps(dict(options))),
    }


def add(content: MutableMapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Put a recipe into what is to be saved, in place.

    Into ``meta`` where there is one; into an attribute of a flat
    ``state_dict``, as no name more may be in it; else beside the other keys.
    """
    meta = content.get('meta')
    if isinstance(meta, dict):
        meta[KEY] = dict(recipe)
    elif hasattr(content, '__dict__'):  # an OrderedDict
        setattr(content, KEY, dict(recipe))
    else:
        content[KEY] = dict(recipe)


def find(content: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the recipe in what was read from a file; empty without one."""
    meta = content.get('meta')
    found: Any = meta.get(KEY) if isinstance(meta, Mapping) else None
    found = found or getattr(content, KEY, None) or content.get(KEY)
    return dict(found) if isinstance(found, Mapping) else {}


def read(path: str) -> Dict[str, Any]:
    """Return the recipe of a file that was made, or of a YAML or JSON file."""
    if path.endswith(('.yaml', '.yml', '.json')):
        recipe: Any = _read_text(path)
    else:
        from mmdet_ema.checkpoint.mapped import read_file

        recipe = find(read_file(path, check=False))
    kinds = {'command': str, 'version': str, 'inputs': list, 'options': dict}
    right = isinstance(recipe, dict) and all(
        isinstance(recipe.get(key), kind) for key, kind in kinds.items()
    )
    if not right or not all(
        isinstance(x, dict) and {'path', 'sha256'} <= {*x}
        for x in recipe['inputs']
    ):
        raise CheckpointError(
            f'{path!r} has no recipe of mmdet-ema in it; give a file that '
            f'extract, convert or average made.'
        )
    return recipe  # type: ignore[no-any-return]


def check_inputs(
    recipe: Mapping[str, Any], paths: Sequence[str] = ()
) -> List[str]:
    """Return the paths of a recipe's inputs, which must be as they were.

    ``paths`` are where they are now, in any order; by default those in it.
    """
    entries = recipe['inputs']
    if paths and len(paths) != len(entries):
        raise CheckpointError(
            f'the recipe is of {len(entries)} files, {len(paths)} are given; '
            f'give none, or all.'
        )
    given = list(paths) or [str(entry['path']) for entry in entries]
    for path in given:
        if not paths and not os.path.isfile(path):
            raise CheckpointError(
                f'{path!r}, which the recipe is made of, is not there; if '
                f'files were moved, name all {len(entries)} beside --recipe.'
            )
    known = {sha256_of(path): path for path in given}
    wanted = [str(entry['sha256']) for entry in entries]
    for found, path in known.items():
        if found not in wanted:
            short = ', '.join(x[:8] for x in wanted)
            raise CheckpointError(
                f'{path!r} is not the file that the recipe was made with '
                f'(sha256 {found[:8]}, not {short}); give that file.'
            )
    for found, entry in zip(wanted, entries):
        if found not in known:
            raise CheckpointError(
                f'no file that is given is what {entry["path"]!r} was (sha256 '
                f'{found[:8]}); give that file.'
            )
    return [known[found] for found in wanted]


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            for block in iter(lambda: file.read(2**20), b''):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f'{path!r} cannot be read ({error.strerror}).'
        ) from None
    return digest.hexdigest()


def _read_text(path: str) -> Any:
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read()
        if path.endswith('.json'):
            return json.loads(text)
        import yaml  # type: ignore[import-untyped, unused-ignore]

        return yaml.safe_load(text)
    except ImportError:
        raise CheckpointError(
            f'{path!r} needs PyYAML (pip install pyyaml), or save the recipe '
            f'as .json.'
        ) from None
    except Exception as error:  # a parser may raise anything
        cause = (str(error).splitlines() or [''])[0][:200]
        raise CheckpointError(
            f'{path!r} is no recipe ({cause}); give one that '
            f'`mmdet-ema inspect FILE --recipe` printed.'
        ) from None
