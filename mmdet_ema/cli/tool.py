"""Find and run a framework's own tool, with an edited config."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Callable, List
from unittest import mock

from mmdet_ema.cli.generations import Generation, installed
from mmdet_ema.errors import OptionError, did_you_mean


def run_tool(
    name: str,
    config: str,
    arguments: List[str],
    edit: Callable[[Any], None],
) -> None:
    """Run ``tools/<name>.py`` of the framework that a config belongs to.

    The tool runs in this process and reads the config as it always does; what
    it gets is edited before it goes on.

    Args:
        name: 'train' or 'test'.
        config: Path of the config file.
        arguments: What follows the config on the tool's command line.
        edit: Edits the loaded config in place.

    Raises:
        OptionError: If the config or the tool cannot be found.
    """
    generation = installed()
    tool = find_tool(_scope(generation, config), name)
    read = generation.config.fromfile

    def read_and_edit(filename: Any, *args: Any, **kwargs: Any) -> Any:
        cfg = read(filename, *args, **kwargs)
        if str(filename) == config:
            edit(cfg)
        return cfg

    argv = [str(tool), config, *arguments]
    edited = mock.patch.object(generation.config, 'fromfile', read_and_edit)
    with edited, mock.patch.object(sys, 'argv', argv):
        runpy.run_path(str(tool), run_name='__main__')


def find_tool(scope: str, name: str) -> Path:
    """Return the path of a tool inside an installed framework.

    Args:
        scope: 'mmdet' or 'mmdet3d'.
        name: 'train' or 'test'.

    Returns:
        The path.

    Raises:
        OptionError: If the framework or its tools are not installed.
    """
    spec = importlib.util.find_spec(scope)
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise OptionError(
            f'the config belongs to {scope}, which is not installed; install '
            f'it (pip install {scope}).'
        )
    tool = Path(places[0]) / '.mim' / 'tools' / f'{name}.py'
    if not tool.is_file():
        raise OptionError(
            f'{scope} is installed without its tools (no {tool}); install the '
            f'released package, or run tools/{name}.py of your clone.'
        )
    return tool


def _scope(generation: Generation, config: str) -> str:
    if not os.path.isfile(config):
        raise OptionError(f'there is no config file {config!r}.')
    cfg = generation.config.fromfile(config)
    scope = cfg.get('default_scope') or generation.scope_of(cfg)
    if scope not in generation.scopes:
        near = did_you_mean(str(scope), generation.scopes)
        raise OptionError(
            f'{config!r} has default_scope={scope!r}; mmdet-ema runs the '
            f'tools of {" and ".join(generation.scopes)}.{near} For another '
            f'framework add custom_imports and EMAHook to the config, and run '
            f'its tool.'
        )
    return str(scope)
