"""Read checkpoint files: state dicts of ViT classifiers in the layouts of several libraries.

archive      file -> objects; nothing in a pickle is imported or called
select       objects -> the one model, its prefix, averaged weights or not
layouts      one module for each library's names
canonical    -> timm's names; LayerScale, patch bias and CLIP's projection folded
checkpoint   -> :class:`Checkpoint`, with the geometry and every tensor checked
foreign      why another file is refused
"""

from clipdeploy.models.checkpoints.checkpoint import (
    Checkpoint,
    Shape,
    expected_shapes,
    read_checkpoint,
    read_tower,
    validate,
)
from clipdeploy.models.checkpoints.position import resize_position_grid

__all__ = [
    "Checkpoint",
    "Shape",
    "expected_shapes",
    "read_checkpoint",
    "read_tower",
    "resize_position_grid",
    "validate",
]
