"""Writes the Python client of a packaged model.

The client contains the source of clipdeploy's preprocessing functions, so that both prepare images
identically.
"""

from __future__ import annotations

import inspect
from importlib import resources
from string import Template

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.passport import Passport
from clipdeploy.core.values import is_name
from clipdeploy.core.version import __version__
from clipdeploy.imaging.preprocess import crop_image, to_rgb
from exporters.preprocess_graph import scale_and_offset
from exporters.samples import normalise

__all__ = ["client_source", "template"]

_COPIED = (to_rgb, crop_image, scale_and_offset, normalise)


def template(name: str) -> Template:
    """Read a file of ``packaging/templates``."""
    file = resources.files("clipdeploy").joinpath("packaging", "templates", name)
    return Template(file.read_text(encoding="utf-8"))


def client_source(name: str, passport: Passport) -> str:
    """Return the text of ``client.py`` for the Triton model ``name``.

    Raises:
        ArtifactError: the name is invalid; it could break the text that contains it.
    """
    if not is_name(name):
        raise ArtifactError(
            f"{name!r} is not a valid model name", hint="use letters, digits, - and _"
        )
    spec = passport.preprocess
    batch = passport.input.shape[0]
    return template("client.py.txt").substitute(
        name=name,
        version=__version__,
        spec=repr(spec),
        input=repr(passport.input.name),
        output=repr(passport.output.name),
        dtype=repr(passport.input.dtype),
        batch=batch if isinstance(batch, int) else 0,
        functions="\n\n".join(inspect.getsource(function) for function in _COPIED).rstrip(),
    )
