"""Makes this package's pipelines loadable by Diffusers, in one place.

`DiffusionPipeline.from_pretrained` looks a repo's `_class_name` up as an attribute of the module `diffusers`,
downloads components of listed libraries only, and takes a component's loading method from a base class that it looks
up in the component's own module.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import diffusers

__all__ = ["install", "loadable_base_class"]


def install(modules: Mapping[str, str]) -> None:
    """Lets `diffusers` answer for the pipelines of this package too, when it is asked for a name it does not have.

    Args:
        modules: public name -> submodule; names that end in `Pipeline` are offered.
    """
    module = sys.modules["diffusers"]
    base: Any = type(module)
    if getattr(base, "_offers_diffusers_ext", False):
        return

    class WithExtension(base):
        _offers_diffusers_ext = True

        def __getattr__(self, name: str) -> Any:
            # Called only for what Diffusers has not loaded yet; its own lazy names come first.
            own = getattr(super(), "__getattr__", None)
            try:
                if own is not None:
                    value = own(name)
                    _allow_downloads()
                    return value
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            except AttributeError:
                if name.endswith("Pipeline") and name in modules:
                    return getattr(importlib.import_module("diffusers_ext"), name)
                raise

        def __reduce__(self) -> Any:
            # Pickled as the module that Diffusers made: this class cannot be found by its name.
            return (base, *super().__reduce__()[1:])

    WithExtension.__name__ = base.__name__
    module.__class__ = WithExtension
    _allow_downloads()


def _allow_downloads() -> None:
    """Lists this package among the libraries whose components Diffusers downloads, once its loader is loaded."""
    loader = sys.modules.get("diffusers.pipelines.pipeline_loading_utils")
    if loader is not None:
        getattr(loader, "LOADABLE_CLASSES", {}).setdefault("diffusers_ext", {})


def loadable_base_class(name: str) -> Any:
    """Returns the base class of that name that Diffusers' loader may ask this package for, or `None`."""
    if name.startswith("_") or "diffusers.pipelines.pipeline_loading_utils" not in sys.modules:
        return None  # only the loader asks, and it is loaded by then
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    for library in ("diffusers", "transformers"):
        if name in LOADABLE_CLASSES[library]:
            return getattr(diffusers if library == "diffusers" else importlib.import_module(library), name, None)
    return None
