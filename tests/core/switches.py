"""What tests switch off."""

from mmdet_ema.core.native import library, update


def switch_off(monkeypatch):
    """Let the compiled kernels be missing meanwhile."""
    for module in (update, library):
        monkeypatch.setattr(module, 'library', lambda: None)
