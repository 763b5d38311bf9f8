"""
Reading a spec from YAML.
"""

from pathlib import Path
from typing import Sequence, Tuple

import yaml
from olmo_core.exceptions import OLMoConfigurationError
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .decoding import decode_fields
from .models import NO_FLOAT16
from .training import JolmoModel

__all__ = ["load_spec"]


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JolmoModel:
    """
    Read a spec from YAML. ``include`` names files, relative to this one, that come first;
    interpolation is OmegaConf's.

    :param overrides: ``key=value`` with a dotted key, such as ``optimizer.lr=0.01`` or
        ``stages.0.tokens=1000``. A mapping as value replaces the one that was there.

    :raises OLMoConfigurationError: If a file cannot be read, is no mapping, or has a key or value
        that is not allowed.
    """
    config = _load_yaml(Path(path), ())
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not all(key.split(".")):
            raise OLMoConfigurationError(f"{override!r} is not allowed, allowed is key=value")
        try:
            parsed = OmegaConf.from_dotlist([f"value={value}"])
            OmegaConf.update(config, key, parsed._get_node("value"), merge=False)
        except (OmegaConfBaseException, yaml.YAMLError, IndexError, TypeError, ValueError) as error:
            raise OLMoConfigurationError(f"{override}: {_first_line(error)}") from None
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise OLMoConfigurationError(f"{path}: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    parallelism = plain.get("parallelism")
    if isinstance(parallelism, dict) and "pipeline" in parallelism:
        raise OLMoConfigurationError(
            "parallelism.pipeline: pipeline parallelism is not supported, allowed are data, "
            "replicas and tensor"
        )
    if plain.get("precision") == "float16":
        raise OLMoConfigurationError(f"precision: it is 'float16', {NO_FLOAT16}")
    return decode_fields(JolmoModel, {str(k): v for k, v in plain.items()}, "")


def _load_yaml(path: Path, including: Tuple[Path, ...]) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
        config = OmegaConf.create(text)
    except OSError as error:
        raise OLMoConfigurationError(f"{path}: {error.strerror}, allowed is a YAML file") from None
    except (UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise OLMoConfigurationError(f"{path}: it is no YAML: {_first_line(error)}") from None
    # A text without a colon is a mapping with an empty value to OmegaConf.
    if not isinstance(config, DictConfig) or not isinstance(yaml.safe_load(text), dict):
        raise OLMoConfigurationError(
            f"{path}: it is {'empty' if not text.strip() else 'not a mapping'}, allowed is a YAML "
            "mapping"
        )
    files = config.pop("include", None) or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, (list, ListConfig)):
        raise OLMoConfigurationError(
            f"{path}: include: {files!r} is not allowed, allowed is a file or a list of files"
        )
    for name in reversed(list(files)):
        base = (path.parent / str(name)).resolve()
        if base in including:
            raise OLMoConfigurationError(f"{path}: include of {name} is circular")
        merged = OmegaConf.merge(_load_yaml(base, (*including, base)), config)
        assert isinstance(merged, DictConfig)
        config = merged
    return config


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__
