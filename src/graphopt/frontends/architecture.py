"""Building a transformers model from its configuration alone: parameters without memory, buffers with values."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..ir.errors import CaptureError, CheckpointError


def require_transformers() -> Any:
    """Return the library, or raise an error that says how to install it."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            "reading a Hugging Face checkpoint needs transformers",
            hint='pip install "graphopt[huggingface]"',
        ) from None
    return transformers


def load_config(folder: Path, raw: dict[str, Any]) -> Any:
    """Return the configuration object of a folder, without running any code of it.

    Raises:
        CheckpointError: the architecture is not one of the library's own.
    """
    transformers = require_transformers()
    kind = raw.get("model_type")
    remote = raw.get("auto_map")
    if kind not in transformers.CONFIG_MAPPING:
        if remote:
            raise CheckpointError(
                f"{folder / 'config.json'} asks for code from the checkpoint (auto_map), which is never run",
                hint="use a checkpoint whose architecture transformers knows by itself",
            )
        raise CheckpointError(f"{folder / 'config.json'}: unknown architecture {kind!r}")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is not a configuration of {kind}: {error}"
        ) from error


def config_from(raw: dict[str, Any], where: Path) -> Any:
    """Return the configuration object for the plain data of the file ``where``.

    Raises:
        CheckpointError: the library does not accept it.
    """
    transformers = require_transformers()
    try:
        return transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    except Exception as error:
        raise CheckpointError(f"{where} does not describe a {raw['model_type']}: {error}") from error


def model_class(config: Any) -> Any:
    """Return the library's class for a configuration: the one it was saved with, or the base model.

    Raises:
        CheckpointError: the configuration names a class that the library does not have.
    """
    transformers = require_transformers()
    for name in getattr(config, "architectures", None) or []:
        candidate = getattr(transformers, str(name), None) or _inner_class(config, str(name))
        if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel):
            return candidate
        raise CheckpointError(
            f"the architecture {name!r} is not one of transformers' own",
            hint="remote code is never run; use a checkpoint of a built-in architecture",
        )
    for family in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        with contextlib.suppress(KeyError):
            return family._model_mapping[type(config)]
    raise CheckpointError(f"transformers has no model for {type(config).__name__}")


def _inner_class(config: Any, name: str) -> Any:
    """Return a class beside the configuration's in the library that the library does not name outside, or None."""
    home = type(config).__module__
    if not home.startswith("transformers.models."):
        return None
    with contextlib.suppress(ImportError):
        return getattr(import_module(home.replace(".configuration_", ".modeling_")), name, None)
    return None


def with_memory(config: Any, dtype: torch.dtype) -> Any:
    """Return the library's model of a configuration, which is not changed, with memory for its parameters and no values."""
    from transformers import initialization

    with initialization.no_init_weights():
        model = model_class(config)._from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()
    return model


class _EmptyOnMeta(TorchFunctionMode):
    """Put tensors made by ``torch.empty`` on the meta device: they are parameters that wait for values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters on the meta device as they are created and registered; buffers keep their values."""
    register = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        registered = self._parameters.get(name)
        if registered is not None and not registered.is_meta:
            self._parameters[name] = type(registered)(
                registered.detach().to("meta"), requires_grad=registered.requires_grad
            )

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """Return a model whose parameters are on the meta device and whose buffers are real.

    Args:
        config: of transformers; not changed.
        dtype: of the parameters, where the architecture does not keep float32.
        attention: the library's attention implementation to trace.

    Raises:
        CaptureError: the library cannot build the model without values.
    """
    from transformers import initialization

    cls = model_class(config)
    plain = copy.deepcopy(config)
    _ask_no_caches(plain, [plain])
    try:
        with initialization.no_init_weights(), _parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
            if hasattr(plain, "num_local_experts") or _has_experts(plain):
                options["experts_implementation"] = "batched_mm"
            try:
                model = cls._from_config(plain, **options)
            except TypeError:
                options.pop("experts_implementation", None)
                model = cls._from_config(plain, **options)
        # tying is part of the initialisation that was skipped
        model.tie_weights()
    except Exception as error:
        if "does not support an attention implementation" in str(error):
            raise CaptureError(f"{cls.__name__} has no such attention") from error
        raise CaptureError(
            f"transformers cannot build {cls.__name__} from this configuration: {error}"
        ) from error
    ask_no_caches(model)
    _keep_wide(model, dtype)
    unmade = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if unmade:
        raise CaptureError(f"{cls.__name__} computes its buffer {unmade[0]} from values of its weights")
    return model.eval()


def tensor_names(raw: dict[str, Any]) -> list[str]:
    """Return the names of the tensors of the model that a configuration describes.

    Raises:
        CaptureError: the library cannot build it.
    """
    config = require_transformers().CONFIG_MAPPING[raw.get("model_type")].from_dict(copy.deepcopy(raw))
    return list(build(config, torch.float32, "eager").state_dict())


def nested(config: Any) -> list[Any]:
    """Return a configuration and every configuration inside it."""
    found: list[Any] = []
    work = [config]
    while work:
        current = work.pop(0)
        if not any(current is other for other in found):
            found.append(current)
            work += [value for value in vars(current).values() if hasattr(value, "to_dict")]
    return found


def configurations(model: Any) -> list[Any]:
    """Return every configuration that a model or a part of it reads; parts of some models have copies of their own."""
    found: list[Any] = []
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict") and not any(config is other for other in found):
            found += [part for part in nested(config) if not any(part is other for other in found)]
    return found


def ask_no_caches(model: Any) -> None:
    """Let no part of a model return caches."""
    _ask_no_caches(model.config, configurations(model))


def _ask_no_caches(config: Any, configs: list[Any]) -> None:
    for part in (part for owner in configs for part in nested(owner)):
        if part is config or hasattr(part, "use_cache"):
            part.use_cache = False


def _has_experts(config: Any) -> bool:
    return any(
        getattr(part, name, None)
        for part in nested(config)
        for name in ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    )


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Keep named parameters in float32 for architectures that do so whatever the requested type."""
    import re

    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    for pattern, wide in plan.items():
        matcher = re.compile(str(pattern).replace(".", r"\.").replace("*", ".*"))
        for name, parameter in list(model.named_parameters()):
            if matcher.search(name) and parameter.dtype is not wide:
                owner, _, leaf = name.rpartition(".")
                module = model.get_submodule(owner)
                module._parameters[leaf] = nn.Parameter(parameter.detach().to(wide))
