"""
The tokenizers an experiment can name: raw bytes, a Hugging Face ``tokenizer.json``, or only the
numbers OLMo-core needs to know about data that somebody else already tokenised.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike
from olmo_core.data import TokenizerConfig
from olmo_core.data.types import NumpyUIntTypes
from olmo_core.exceptions import OLMoConfigurationError
from tokenizers import Tokenizer as HFTokenizer

__all__ = ["Tokenizer", "load_tokenizer"]

_EOS_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|padding|>")
_MAX_VOCAB_SIZE = 2**32


@dataclass(frozen=True)
class Tokenizer:
    """What an experiment needs of a tokenizer, wherever it comes from."""

    config: TokenizerConfig
    """The vocabulary size and the special ids, in OLMo-core's terms."""
    name: str
    """A short name for messages."""
    fingerprint: str
    """Hexadecimal digest of the tokenizer: another digest, other token ids."""
    _encode: Callable[[str], ArrayLike] | None = field(default=None, repr=False, compare=False)

    @property
    def can_encode(self) -> bool:
        """Whether :meth:`encode` works. If not, only tokenised data can be used."""
        return self._encode is not None

    @property
    def dtype(self) -> NumpyUIntTypes:
        """The smallest unsigned type that holds every id, which is OLMo-core's choice too."""
        return np.min_scalar_type(self.config.vocab_size - 1).type

    def encode(self, text: str) -> np.ndarray:
        """
        Tokenise ``text`` without adding special tokens. Whatever in it looks like a special token
        is encoded as ordinary text, and a lone surrogate, which UTF-8 can't hold, as ``?``.

        :returns: The ids, of shape ``(num_tokens,)`` and type :attr:`dtype`.

        :raises OLMoConfigurationError: If the tokenizer can't encode.
        """
        if self._encode is None:
            raise OLMoConfigurationError(
                f"tokenizer.identifier: {self.config.identifier!r} is not an existing "
                "tokenizer.json, so text can't be tokenised with it. Give the path to one, or use "
                "only sources of tokenised '.npy' files."
            )
        ids = self._encode(text.encode("utf-8", "replace").decode("utf-8"))
        return np.asarray(ids, dtype=self.dtype)


def load_tokenizer(spec: Any) -> Tokenizer:
    """
    Load the tokenizer that an experiment names. Nothing is ever fetched over the network.

    :param spec: One of

        - ``"bytes"``: ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document and
          257 pads.
        - The path to a Hugging Face ``tokenizer.json``. The end-of-document and padding ids are
          those of the usual names (such as ``<|endoftext|>`` and ``<pad>``); without a padding
          token the end-of-document id pads.
        - A mapping with the fields of :class:`~olmo_core.data.TokenizerConfig`. Text can be
          tokenised only if its ``identifier`` is the path to a local ``tokenizer.json``.

    :raises OLMoConfigurationError: If ``spec`` is none of these, or is inconsistent.
    """
    if spec == "bytes":
        return _bytes_tokenizer()
    if isinstance(spec, (str, Path)):
        return _file_tokenizer(Path(spec))
    if isinstance(spec, Mapping):
        return _mapping_tokenizer(spec)
    _fail("tokenizer", spec, "must be 'bytes', the path to a tokenizer.json or a mapping")


def _bytes_tokenizer() -> Tokenizer:
    config = TokenizerConfig(vocab_size=258, eos_token_id=256, pad_token_id=257, identifier="bytes")
    return Tokenizer(
        config=config,
        name="bytes",
        fingerprint=_fingerprint(config, b"bytes"),
        _encode=lambda text: np.frombuffer(text.encode("utf-8"), dtype=np.uint8),
    )


def _file_tokenizer(path: Path) -> Tokenizer:
    if not os.path.isfile(path):
        _fail("tokenizer", str(path), "is neither 'bytes' nor an existing tokenizer.json")
    content, tokenizer = _read_tokenizer_json("tokenizer", path)
    eos = _find_token(tokenizer, _EOS_TOKENS)
    if eos is None:
        _fail(
            "tokenizer",
            str(path),
            f"has none of the end-of-document tokens {', '.join(_EOS_TOKENS)}. Give a mapping with "
            "vocab_size, eos_token_id, pad_token_id and, as identifier, this path instead",
        )
    pad = _find_token(tokenizer, _PAD_TOKENS)
    config = TokenizerConfig(
        vocab_size=_vocab_size(tokenizer),
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        identifier=str(path),
    )
    return _hf_tokenizer(config, path, content, tokenizer)


def _mapping_tokenizer(spec: Mapping) -> Tokenizer:
    config = _parse_config(spec)
    path = None if config.identifier is None else Path(config.identifier)
    if path is None or not os.path.isfile(path):
        name = config.identifier or "unnamed"
        return Tokenizer(config, name, _fingerprint(config, name.encode()))
    content, tokenizer = _read_tokenizer_json("tokenizer.identifier", path)
    if (needed := _vocab_size(tokenizer)) > config.vocab_size:
        _fail(
            "tokenizer.vocab_size",
            config.vocab_size,
            f"is less than the {needed} ids of '{path}'; it must be at least as many",
        )
    return _hf_tokenizer(config, path, content, tokenizer)


def _hf_tokenizer(
    config: TokenizerConfig, path: Path, content: bytes, tokenizer: HFTokenizer
) -> Tokenizer:
    # A tokenizer.json may ask for any of these, and each would change or lose a document's text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return Tokenizer(
        config=config,
        name="/".join(path.absolute().parts[-2:]),
        fingerprint=_fingerprint(config, content),
        _encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )


def _read_tokenizer_json(field_name: str, path: Path) -> tuple[bytes, HFTokenizer]:
    try:
        content = path.read_bytes()
        tokenizer = HFTokenizer.from_str(content.decode("utf-8"))
    # The library raises a bare 'Exception' for whatever it can't parse.
    except Exception as e:
        _fail(field_name, str(path), f"can't be read as a Hugging Face tokenizer.json ({e})")
    if not tokenizer.get_vocab():
        _fail(field_name, str(path), "has an empty vocabulary; it must have at least one token")
    return content, tokenizer


def _vocab_size(tokenizer: HFTokenizer) -> int:
    # Ids may have gaps, in which case the number of tokens is too small a size.
    return max(tokenizer.get_vocab().values()) + 1


def _find_token(tokenizer: HFTokenizer, names: Sequence[str]) -> int | None:
    ids = (tokenizer.token_to_id(name) for name in names)
    return next((id_ for id_ in ids if id_ is not None), None)


def _parse_config(spec: Mapping) -> TokenizerConfig:
    allowed = {f.name: f.default is MISSING for f in fields(TokenizerConfig)}
    for key in spec:
        if key not in allowed:
            _fail(
                f"tokenizer.{key}", spec[key], f"is not a field; allowed are {', '.join(allowed)}"
            )
    for key, required in allowed.items():
        if required and key not in spec:
            _fail("tokenizer", dict(spec), f"has no '{key}', which is required")

    size = _parse_int("vocab_size", spec["vocab_size"], 1, _MAX_VOCAB_SIZE)
    identifier = spec.get("identifier")
    if identifier is not None and not isinstance(identifier, str):
        _fail("tokenizer.identifier", identifier, "must be a path, a name or null")
    bos = spec.get("bos_token_id")
    return TokenizerConfig(
        vocab_size=size,
        eos_token_id=_parse_int("eos_token_id", spec["eos_token_id"], 0, size - 1),
        pad_token_id=_parse_int("pad_token_id", spec["pad_token_id"], 0, size - 1),
        bos_token_id=None if bos is None else _parse_int("bos_token_id", bos, 0, size - 1),
        identifier=identifier,
    )


def _parse_int(key: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _fail(f"tokenizer.{key}", value, f"must be a whole number from {low} to {high}")
    return value


def _fingerprint(config: TokenizerConfig, content: bytes) -> str:
    # The identifier stays out: where a tokenizer.json lies doesn't change what it does.
    numbers = {k: v for k, v in sorted(asdict(config).items()) if k != "identifier"}
    return hashlib.sha256(repr(numbers).encode() + content).hexdigest()


def _fail(field_name: str, value: Any, problem: str) -> NoReturn:
    raise OLMoConfigurationError(f"{field_name}: {value!r} {problem}.")
