"""Convert a checkpoint into the format of another project."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional, Tuple

from mmdet_ema.checkpoint import recipe as recipes
from mmdet_ema.checkpoint import saving
from mmdet_ema.checkpoint.contents import (
    Contents,
    Format,
    holds,
    read_contents,
)
from mmdet_ema.checkpoint.extract import is_safetensors
from mmdet_ema.checkpoint.formats import ALIASES, FORMATS
from mmdet_ema.errors import CheckpointError, OptionError, did_you_mean

# files whose meta, optimizer and histories mean the same
_FAMILIES = (('mmdet_ema', 'mmengine'), ('bevdet', 'mmcv1', 'mmdet2'))
# what else such a file is about stays in the family of OpenMMLab
_OPENMMLAB = ('plain', *(name for names in _FAMILIES for name in names))


@dataclass
class Converted:
    """What became of a file: formats by name, the rest in words."""

    paths: List[str]
    source: str
    target: str
    kept: List[str]
    lost: List[str]
    notes: List[str]


def convert(
    path: str,
    out: str,
    to: str,
    *,
    force: bool = False,
    unsafe: bool = False,
    recipe: Optional[Dict[str, Any]] = None,
) -> Converted:
    """Write a checkpoint in another format.

    Names of tensors stay: a model of another project has others.

    Args:
        path: The file to read.
        out: The file to write; ``'-'`` for the standard output.
        to: Name of the format, one of ``formats.FORMATS``.
        force: Whether to replace a file. Defaults to False.
        unsafe: Whether to run code that the file asks for. Defaults to False.
        recipe: Goes into the file. Defaults to that of this call.

    Raises:
        CheckpointError: If the file cannot be read, or the format needs what
            it does not have.
        OptionError: If there is no such format.
    """
    name = format_name(to)
    if is_safetensors(out):
        raise OptionError(
            f'{out!r}: convert writes files of torch, as the projects do; '
            f'for one set of weights as safetensors use extract.'
        )
    saving.check_free(out, force)
    contents = read_contents(path, unsafe=unsafe)
    if recipe is None:
        recipe = recipes.make('convert', [path], {'to': name})
    form = FORMATS[name]
    assert form.write is not None  # format_name() has checked it
    source, lost = _without_foreign(contents, name)
    content, more = form.write(source, out)
    kept, words = _kept_and_lost(source, form)
    lost += words + more
    second = None
    if form.write_second is not None:
        if out == saving.STDOUT:
            raise CheckpointError(
                f'{name} is two files, which the standard output cannot '
                f'take; name a file.'
            )
        second = form.write_second(source, out)
        saving.check_free(second[0], force)
    content, unread = saving.plain(content)
    lost += some(unread, 'objects that only their own code reads')
    if name == 'plain':
        recipe = {**recipe, 'holds': holds(contents, contents.choose())}
    recipes.add(content, recipe)
    paths = [saving.save(content, out, force=force)]
    if second is not None:
        recipes.add(second[1], recipe)
        paths.append(saving.save(second[1], second[0], force=force))
    notes = list(contents.notes)
    return Converted(paths, contents.format, name, kept, lost, notes)


def format_name(to: str) -> str:
    """Return the name of a format that can be written."""
    name = ALIASES.get(to.lower(), to.lower())
    known = [x.name for x in FORMATS.values() if x.write is not None]
    if name not in known:
        raise OptionError(
            f'--to {to!r} is not known; use one of {", ".join(known)}.'
            f'{did_you_mean(name, [*known, *ALIASES])}'
        )
    return name


def some(names: List[str], what: str) -> List[str]:
    """Return words on the names of what was lost; empty if nothing was."""
    if not names:
        return []
    few = ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
    return [f'{len(names)} {what} ({few})']


def _without_foreign(contents: Contents, to: str) -> Any:
    """Leave out what means nothing in another format, and say so."""
    pair = {contents.format, to}
    related = len(pair) == 1 or any(pair <= {*names} for names in _FAMILIES)
    meta = contents.meta if related or pair <= {*_OPENMMLAB} else {}
    lost = []
    if contents.rest and not related:
        lost.append(f'the rest of the file ({", ".join(contents.rest)})')
    if contents.meta and not meta:
        lost.append(f'meta ({", ".join(contents.meta)})')
    rest = dict(contents.rest) if related else {}
    return replace(contents, meta=dict(meta), rest=rest), lost


def _kept_and_lost(
    contents: Contents, form: Format
) -> Tuple[List[str], List[str]]:
    """Return words on sets, n and schedule: what a format holds, and not."""
    main = contents.choose()
    held = {'all': [*contents.sets], 'both': ['raw', main], 'one': [main]}
    kept, gone = [], []
    for name, weights in contents.sets.items():
        if name not in held[form.holds]:
            gone.append(name)
        elif weights.updates is None or form.has_n is False:
            kept.append(name)
        else:
            kept.append(f'{name} (n = {weights.updates})')
    lost = [f'weights {", ".join(gone)}'] if gone else []
    n = contents.sets[main].updates
    if form.has_n is (n is None):
        lost.append(f'n, which is {"written as 0" if n is None else n}')
    if contents.sets[main].schedule and not form.has_schedule:
        lost.append('the schedule')
    return kept, lost
