"""Makes this package's pipelines loadable by Diffusers, in one place.

`DiffusionPipeline.from_pretrained` looks a repo's `_class_name` up as an attribute of the module `diffusers`,
downloads components of listed libraries only, takes a component's loading method from a base class that it looks up in
the component's own module, loads a pipeline within a pipeline without telling it dtype, variant or format, and finds
the quantizer of a saved model in a table of its own.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

__all__ = ["install", "loadable_base_class"]

QUANTIZERS = "diffusers.quantizers.auto"


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
                    _prepare_loader()
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
    _prepare_loader()
    if QUANTIZERS in sys.modules:
        _register_quantizer(sys.modules[QUANTIZERS])
    else:
        sys.meta_path.insert(0, _BeforeQuantizers())


def _prepare_loader() -> None:
    """Adapts Diffusers' loader to this package's pipelines, once it is loaded."""
    classes = sys.modules.get("diffusers.pipelines.pipeline_loading_utils")
    if classes is not None:  # libraries whose components Diffusers downloads
        getattr(classes, "LOADABLE_CLASSES", {}).setdefault("diffusers_ext", {})
    loader: Any = sys.modules.get("diffusers.pipelines.pipeline_utils")
    if hasattr(loader, "DiffusionPipeline") and not hasattr(loader.load_sub_model, "__wrapped__"):
        loader._identify_model_variants = _past_nested_pipelines(loader._identify_model_variants)
        loader.load_sub_model = _with_nested_pipelines(loader.load_sub_model)
    auto: Any = sys.modules.get("diffusers.pipelines.auto_pipeline")
    if hasattr(auto, "AutoPipelineForText2Image") and not hasattr(auto._get_task_class, "__wrapped__"):
        auto._get_task_class = _with_one_more_step(auto._get_task_class, auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING)


class _BeforeQuantizers(importlib.abc.MetaPathFinder):
    """Waits for the module that knows the quantizers: importing it now would import all of the networks."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _register_quantizer(module)

        spec.loader.exec_module = exec_module
        return spec


class _LazyConfig(type):
    """Stands for `QDiffConfig` where Diffusers keeps configurations, without importing it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return type(instance).__name__ == "QDiffConfig" and isinstance(instance, _ours().QDiffConfig)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _ours().QDiffConfig(*args, **kwargs)

    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return _ours().QDiffConfig.from_dict(*args, **kwargs)


def _ours() -> Any:
    return importlib.import_module("diffusers_ext")


def _register_quantizer(auto: Any) -> None:
    """Tells Diffusers' loader of the quantizer "qdiff"."""
    config = _LazyConfig("QDiffConfig", (), {"__doc__": "See diffusers_ext.QDiffConfig."})
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("qdiff", config)
    auto.AUTO_QUANTIZER_MAPPING.setdefault("qdiff", lambda *args, **kwargs: _ours().QDiffQuantizer(*args, **kwargs))


def _is_pipeline(folder: Any, name: str) -> bool:
    return (Path(folder) / name / "model_index.json").is_file()


def _past_nested_pipelines(identify: Any) -> Any:
    """Mends the search for variants, which ends in an IndexError where a component is a pipeline itself."""

    @functools.wraps(identify)
    def identify_model_variants(folder: Any, variant: str | None, config: dict[str, Any]) -> dict[str, str]:
        nested = [name for name in config if _is_pipeline(folder, name)]
        found = identify(folder, variant, {name: entry for name, entry in config.items() if name not in nested})
        if variant is not None:
            found |= {name: variant for name in nested if any((Path(folder) / name).rglob(f"*.{variant}*"))}
        return found

    return identify_model_variants


def _with_nested_pipelines(load: Any) -> Any:
    """Lets a pipeline within one of ours load in the dtype, variant and format that the outer one was asked for."""

    @functools.wraps(load)
    def load_sub_model(**options: Any) -> Any:
        ours = options["pipeline_class"].__module__ == "diffusers_ext"
        if not (ours and _is_pipeline(options["cached_folder"], options["name"])):
            return load(**options)
        from diffusers.pipelines.pipeline_loading_utils import get_class_obj_and_candidates

        same = ("library_name", "class_name", "importable_classes", "pipelines", "is_pipeline_module")
        kind: Any = get_class_obj_and_candidates(
            **{name: options[name] for name in (*same, "trust_remote_code")},
            component_name=options["name"],
            cache_dir=options["cached_folder"],
        )[0]
        passed = ("dtype", "use_safetensors", "low_cpu_mem_usage", "quantization_config", "trust_remote_code")
        return kind.from_pretrained(
            str(Path(options["cached_folder"]) / options["name"]),
            variant=options["model_variants"].pop(options["name"], None),
            device_map=options["device_map"] if isinstance(options["device_map"], str) else None,
            **{name: options[name] for name in passed},
        )

    return load_sub_model


def _with_one_more_step(find: Any, text_to_image: Any) -> Any:
    """Lets `AutoPipelineForText2Image` load `OMSPipeline`, without importing it before."""

    @functools.wraps(find)
    def get_task_class(mapping: Any, pipeline_class_name: str, *args: Any, **kwargs: Any) -> Any:
        if pipeline_class_name == "OMSPipeline" and mapping is text_to_image:
            return importlib.import_module("diffusers_ext").OMSPipeline
        return find(mapping, pipeline_class_name, *args, **kwargs)

    return get_task_class


def loadable_base_class(name: str) -> Any:
    """Returns the base class of that name that Diffusers' loader may ask this package for, or `None`."""
    if name.startswith("_") or "diffusers.pipelines.pipeline_loading_utils" not in sys.modules:
        return None  # only the loader asks, and it is loaded by then
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

    for library in ("diffusers", "transformers"):
        if name in LOADABLE_CLASSES[library]:
            return getattr(diffusers if library == "diffusers" else importlib.import_module(library), name, None)
    return None
