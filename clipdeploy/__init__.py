"""CLIP-pretrained ViT classifiers, from a PyTorch checkpoint to a proven TensorRT engine.

    import clipdeploy

    workspace = clipdeploy.Workspace("artifacts")
    clipdeploy.export_model(workspace, "clip-vit-base-p16")

Every public name is an attribute of this package; :mod:`clipdeploy.pipeline` has the list.  The
first use of one imports the stages; ``import clipdeploy`` alone imports nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from clipdeploy.core.version import __version__ as __version__

if TYPE_CHECKING:
    from clipdeploy.pipeline import *  # noqa: F403


def __getattr__(name: str) -> object:
    if not name.startswith("_"):
        public = import_module("clipdeploy.pipeline")
        if name in public.__all__:
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("clipdeploy.pipeline").__all__})
