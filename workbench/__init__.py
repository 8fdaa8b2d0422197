"""Workbench: each notebook kernel in its own container, each change a layer.

This module stays light: the helper process of every launch imports it.
"""

__version__ = "0.1.0"
