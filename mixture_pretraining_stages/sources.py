"""
Where the tokens of a mixture come from: text that ships with Python, or local files. Text is
tokenised once into a cache, and every source is split into a train and a held-out validation part.
"""

import ast
import errno
import glob
import gzip
import hashlib
import json
import os
import platform
import shutil
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
import zstandard
from olmo_core.data.composable import (
    ConcatAndChunkInstanceSource,
    InstanceSource,
    NumpyDocumentSource,
    SlicedTokenSource,
)
from olmo_core.distributed.utils import all_gather_object, get_fs_local_rank
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages.tokenizers import Tokenizer

__all__ = [
    "BUILTINS",
    "Document",
    "SourceSpec",
    "TokenizedSource",
    "is_held_out",
    "prepare_source",
    "read_documents",
]

TEXT_ENDINGS = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst")
ENDINGS = (*TEXT_ENDINGS, ".npy")

_FORMAT_VERSION = 1
_HELD_OUT_ONE_IN = 20
_WINDOW = 1_000_000
_ZSTD_MAX_WINDOW = 2**31
_NOT_STDLIB = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
)
_TOPICS_MODULE = "pydoc_data.topics"


@dataclass
class SourceSpec:
    """
    Where the tokens of a source come from. Exactly one of :attr:`builtin` and :attr:`path` is set.
    """

    builtin: str | None = None
    """
    ``"python-code"``, the modules of the standard library, or ``"python-docs"``, their docstrings
    and the topics of ``pydoc``.
    """
    path: Any = None
    """
    A local file, folder or glob, or a list of them. Text is read from ``.txt`` (a document per
    file), ``.jsonl``, ``.jsonl.gz`` and ``.jsonl.zst`` (a document per line); ``.npy`` are raw
    arrays of token ids as OLMo-core reads them. A folder stands for all such files below it.
    """
    text_field: str = "text"
    """The field of a line of ``.jsonl`` that holds the document's text."""


class Document(NamedTuple):
    """A text, and what decides whether it is held out."""

    key: str
    """The name of the document within its source."""
    text: str
    position: int
    """How many bytes of input have been read when the document is complete."""


class _Input(NamedTuple):
    key: str
    path: Path
    size: int
    mtime_ns: int


class _Span(NamedTuple):
    """The tokens ``start`` to ``stop`` of some files taken as one array."""

    paths: tuple[Path, ...]
    start: int
    stop: int


class _Problem(OLMoConfigurationError):
    """What is wrong with a field of a :class:`SourceSpec`, before it's known whose it is."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}.")


@dataclass(frozen=True)
class TokenizedSource:
    """A source whose tokens are on disk, split into a train and a validation part."""

    name: str
    train_tokens: int
    validation_tokens: int
    train_documents: int | None
    """``None`` if the source was given as tokens."""
    validation_documents: int | None
    """``None`` if the source was given as tokens."""
    validation_bytes: int | None
    """
    The size of the held-out text as UTF-8, in bytes, or ``None`` if the source was given as tokens.
    """
    _tokenizer: Tokenizer = field(repr=False)
    _train: _Span = field(repr=False)
    _validation: _Span = field(repr=False)

    def bytes_per_token(self) -> float | None:
        """
        The mean number of bytes of held-out text per validation token, the end-of-document ones
        included, or ``None`` if the text isn't known.
        """
        if self.validation_bytes is None:
            return None
        return self.validation_bytes / self.validation_tokens

    def train_instances(self, sequence_length: int, work_dir: Path) -> InstanceSource:
        """
        The train part in instances of shape ``(sequence_length,)``, regardless of document borders.
        With several processes all of them have to call this.

        :raises OLMoConfigurationError: If the part is shorter than one instance.
        """
        return self._instances("train", self._train, sequence_length, work_dir)

    def validation_instances(self, sequence_length: int, work_dir: Path) -> InstanceSource:
        """Like :meth:`train_instances`, for the validation part."""
        return self._instances("validation", self._validation, sequence_length, work_dir)

    def _instances(
        self, part: str, span: _Span, sequence_length: int, work_dir: Path
    ) -> InstanceSource:
        num_tokens = span.stop - span.start
        if num_tokens < sequence_length:
            raise OLMoConfigurationError(
                f"sequence_length: {sequence_length} is more than the {num_tokens} tokens in the "
                f"{part} part of source '{self.name}'; it must be at most that."
            )
        documents = NumpyDocumentSource(
            source_paths=span.paths,
            dtype=self._tokenizer.dtype,
            tokenizer=self._tokenizer.config,
            work_dir=work_dir,
            label=self.name,
        )
        tokens = SlicedTokenSource(
            documents, slice(span.start, span.stop), work_dir=work_dir, label=self.name
        )
        return ConcatAndChunkInstanceSource(
            tokens, sequence_length=sequence_length, work_dir=work_dir, label=self.name
        )


def prepare_source(
    name: str,
    spec: SourceSpec,
    tokenizer: Tokenizer,
    cache_dir: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> TokenizedSource:
    """
    Make the tokens of a source available on disk, and split them.

    Text is tokenised into a folder of ``cache_dir`` named after everything that defines the tokens,
    so that it's reused until one of those changes. About 5 % of the documents are held out, see
    :func:`is_held_out`; if that would be none or all of them, it's the last document instead, and
    of a single document the last 5 % of its tokens (then :attr:`TokenizedSource.validation_bytes`
    is the proportional part of the text's size). Documents without text are left out.

    ``.npy`` files are used where they are. Their last 5 % of tokens are held out, from the first
    document border in there if there is one.

    With several processes all of them have to call this. One per file system writes while the
    others wait, so a source that takes longer than the process group's timeout has to be prepared
    by a single process beforehand. A killed writer leaves behind a hidden folder ending in
    ``.tmp``, which is never read and can be deleted.

    :param name: What messages call the source.
    :param progress: Called now and then while text is tokenised with the name, the bytes of input
        read so far and the bytes of input in total.

    :raises OLMoConfigurationError: If the spec is wrong, a file is missing, unreadable or not what
        its ending says, a part of the split has no tokens, or ``cache_dir`` can't be written to.
        All processes raise it.
    """
    source: TokenizedSource | None = None
    failure: Exception | None = None
    if get_fs_local_rank() == 0:
        try:
            source = _prepare(name, spec, tokenizer, cache_dir, progress)
        # Whatever it is, the processes that wait below have to learn about it.
        except Exception as e:
            failure = e
    # There is a writer per file system, and any of them may fail: a broadcast would tell of one.
    messages = all_gather_object(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for message in messages:
        if message is not None:
            raise OLMoConfigurationError(message)
    return source or _prepare(name, spec, tokenizer, cache_dir, None)


def is_held_out(key: str) -> bool:
    """
    Whether the document of this key belongs to the validation part. It depends on nothing but the
    key, so that a module held out as code is held out in the documentation too.
    """
    # A file's name needn't be valid UTF-8.
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    return int(digest[:8], 16) % _HELD_OUT_ONE_IN == 0


def read_documents(spec: SourceSpec) -> Iterator[Document]:
    """
    Read the documents of a text source one at a time, in an order that doesn't change.

    The documents of ``python-code`` and ``python-docs`` have the module's dotted name as key, those
    of topics ``topics.<name>``, a ``.txt`` its path relative to the folder or glob that was given,
    and a line of ``.jsonl`` that path (without the ending of a compression) and its number.
    ``pydoc_data.topics`` is no part of ``python-code``, since all topics are in it.

    :raises OLMoConfigurationError: If the spec is wrong, or a file can't be read.
    """
    return _read_inputs(spec, _resolve(spec))


def _prepare(
    name: str,
    spec: SourceSpec,
    tokenizer: Tokenizer,
    cache_dir: Path,
    progress: Callable[[str, int, int], None] | None,
) -> TokenizedSource:
    try:
        inputs = _resolve(spec)
        if inputs[0].path.name.endswith(".npy"):
            return _open_tokens(name, [input_.path.absolute() for input_ in inputs], tokenizer)
        if not tokenizer.can_encode:
            raise _Problem(
                "builtin" if spec.builtin else "path",
                f"text can't be tokenised with tokenizer '{tokenizer.name}', which has no local "
                "tokenizer.json; name one as tokenizer.identifier, or use '.npy' files",
            )
        digest = _digest(spec, inputs, tokenizer)
        target = Path(cache_dir).absolute() / f"{spec.builtin or 'text'}-{digest}"
        meta = _read_meta(target, tokenizer)
        if meta is None:
            documents = _read_inputs(spec, inputs)
            if progress is not None:
                total = sum(input_.size for input_ in inputs)
                documents = _report(documents, partial(progress, name), total)
            meta = _write_cache(target, documents, spec, tokenizer)
    except _Problem as e:
        raise OLMoConfigurationError(f"sources.{name}.{e}") from e
    return _open_cache(name, target, meta, tokenizer)


def _resolve(spec: SourceSpec) -> list[_Input]:
    if (spec.builtin is None) == (spec.path is None):
        given = "neither" if spec.path is None else "both"
        raise _Problem("builtin", f"{given} of builtin and path given; exactly one is needed")
    if spec.builtin is not None:
        if spec.builtin not in tuple(BUILTINS):
            allowed = ", ".join(BUILTINS)
            raise _Problem("builtin", f"{spec.builtin!r} is unknown; allowed are {allowed}")
        return _stdlib_modules()
    if not isinstance(spec.text_field, str) or not spec.text_field:
        raise _Problem("text_field", f"{spec.text_field!r} must be the name of a field")

    patterns = [spec.path] if isinstance(spec.path, (str, Path)) else spec.path
    if (
        not isinstance(patterns, Sequence)
        or not patterns
        or not all(isinstance(p, (str, Path)) and str(p) for p in patterns)
    ):
        raise _Problem("path", f"{spec.path!r} must be a path or a non-empty list of paths")
    # Patterns may overlap, and no file should count twice for it.
    inputs = list({i.path: i for pattern in patterns for i in _expand(str(pattern))}.values())
    if len({input_.path.name.endswith(".npy") for input_ in inputs}) > 1:
        raise _Problem("path", f"{spec.path!r} mixes '.npy' with text files; make it two sources")
    return inputs


def _stdlib_modules() -> list[_Input]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    with _reading(root):
        for path in _files_below(root, (".py",), skip=_NOT_STDLIB):
            parts = path.relative_to(root).with_suffix("").parts
            key = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            modules.append(_input(key, path))
    if not modules:
        raise _Problem("builtin", f"this Python has no source files in '{root}'; use a path")
    return sorted(modules)


def _expand(pattern: str) -> list[_Input]:
    with _reading(pattern):
        path = Path(pattern)
        if path.is_dir():
            root, paths = path, _files_below(path, ENDINGS)
        elif path.exists():
            root, paths = path.parent, [path]
        elif _is_glob(pattern):
            root = Path(*takewhile(lambda part: not _is_glob(part), path.parts))
            matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
            found = [_files_below(m, ENDINGS) if m.is_dir() else [m] for m in matches]
            paths = [path for group in found for path in group]
        else:
            raise _Problem("path", f"'{pattern}' doesn't exist; it must be a local path or glob")
        if not paths:
            allowed = ", ".join(ENDINGS)
            raise _Problem("path", f"'{pattern}' matches no local file; allowed are {allowed}")
        for path in paths:
            if not path.name.endswith(ENDINGS):
                allowed = ", ".join(ENDINGS)
                raise _Problem("path", f"'{path}' has an unknown ending; allowed are {allowed}")
        return [_input(_relative_key(path, root), path) for path in paths]


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _relative_key(path: Path, root: Path) -> str:
    key = path.relative_to(root).as_posix()
    return key.removesuffix(".gz").removesuffix(".zst")


def _files_below(
    folder: Path, endings: tuple[str, ...], skip: frozenset[str] = frozenset()
) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    paths = []
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in skip]
        paths += [Path(parent, name) for name in names if name.endswith(endings)]
    return sorted(paths)


def _input(key: str, path: Path) -> _Input:
    with _reading(path):
        stat = path.stat()
    return _Input(key, path, stat.st_size, stat.st_mtime_ns)


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Turn everything that can go wrong with reading a file into a problem that names it."""
    try:
        yield
    except OSError as e:
        raise _Problem("path", f"'{e.filename or path}' can't be read ({e.strerror or e})") from e
    except (EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError) as e:
        raise _Problem("path", f"'{path}' can't be read ({e})") from e


def _read_inputs(spec: SourceSpec, inputs: Iterable[_Input]) -> Iterator[Document]:
    if spec.builtin is not None:
        read = BUILTINS[spec.builtin]
    else:
        read = partial(_read_file, text_field=spec.text_field)
    done = 0
    for input_ in inputs:
        for key, text, position in read(input_):
            if text:
                yield Document(key, text, done + position)
        done += input_.size


def _read_code(module: _Input) -> Iterator[Document]:
    if module.key != _TOPICS_MODULE:
        yield Document(module.key, _read_module(module), module.size)


def _read_docs(module: _Input) -> Iterator[Document]:
    if module.key == _TOPICS_MODULE:
        from pydoc_data.topics import topics

        for topic, text in sorted(topics.items()):
            yield Document(f"topics.{topic}", text, module.size)
        return
    try:
        # Old modules make the compiler warn about their escape sequences.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(_read_module(module))
    except (SyntaxError, ValueError, RecursionError):
        return
    yield Document(module.key, "\n\n".join(_docstrings(tree, module.key)), module.size)


def _read_module(module: _Input) -> str:
    """The source of a module, or nothing if its encoding isn't the one it declares."""
    with _reading(module.path):
        try:
            with tokenize.open(module.path) as file:
                return file.read()
        except (SyntaxError, UnicodeDecodeError):
            return ""


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n{docstring}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from _docstrings(child, name)


BUILTINS: dict[str, Callable[[_Input], Iterator[Document]]] = {
    "python-code": _read_code,
    "python-docs": _read_docs,
}
"""The builtin sources, and how to read a module of the standard library for them."""


def _read_file(input_: _Input, text_field: str) -> Iterator[Document]:
    with _reading(input_.path):
        if input_.path.suffix == ".txt":
            yield Document(input_.key, input_.path.read_bytes().decode("utf-8"), input_.size)
            return
        with input_.path.open("rb") as file:
            for number, line in enumerate(_lines(file, input_.path.suffix), start=1):
                if line.strip():
                    text = _parse_line(line, text_field, f"'{input_.path}', line {number}")
                    yield Document(f"{input_.key}:{number}", text, file.tell())


def _lines(file: BinaryIO, ending: str) -> Iterable[bytes]:
    if ending == ".gz":
        return gzip.GzipFile(fileobj=file)
    if ending == ".zst":
        return _zstd_lines(file)
    return file


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    for data in _zstd_data(file):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    yield rest


def _zstd_data(file: BinaryIO) -> Iterator[bytes]:
    # The library's own reader stops after the first of several frames by default, and takes a file
    # that was cut off for a whole one.
    frame = None
    while data := file.read(zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE):
        while data:
            if frame is None:
                decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
                frame = decompressor.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the file ends in the middle of a frame")


def _parse_line(line: bytes, text_field: str, place: str) -> str:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise _Problem("path", f"{place} isn't JSON ({e})") from e
    if not isinstance(fields, dict):
        raise _Problem("path", f"{place} must be an object with the field '{text_field}'")
    text = fields.get(text_field)
    if not isinstance(text, str):
        problem = "isn't a string" if text_field in fields else "is missing; see text_field"
        raise _Problem("path", f"{place}: field '{text_field}' {problem}")
    return text


def _report(
    documents: Iterator[Document], progress: Callable[[int, int], None], total: int
) -> Iterator[Document]:
    reported = 0
    for document in documents:
        yield document
        # Often enough for a bar on a screen, whatever the number of documents.
        if document.position - reported >= total / 200:
            reported = document.position
            progress(reported, total)
    progress(total, total)


@dataclass
class _Part:
    """One part of a split while it's written."""

    file: BinaryIO
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        self.file.write(ids.tobytes())
        self.tokens += len(ids)
        self.documents += 1
        self.text_bytes += text_bytes

    def finish(self, path: Path) -> dict[str, int]:
        _flush(self.file)
        os.replace(self.file.name, path)
        counts = ("tokens", "documents", "text_bytes")
        return {count: getattr(self, count) for count in counts}


def _digest(spec: SourceSpec, inputs: list[_Input], tokenizer: Tokenizer) -> str:
    detail = platform.python_version() if spec.builtin else spec.text_field
    header = (_FORMAT_VERSION, tokenizer.fingerprint, spec.builtin, detail)
    digest = hashlib.sha256(repr(header).encode())
    for key, path, size, mtime_ns in inputs:
        # Two installations of one Python version differ in paths and times, but not in content.
        content = (key, size) if spec.builtin else (key, str(path.absolute()), size, mtime_ns)
        digest.update(repr(content).encode())
    return digest.hexdigest()[:16]


def _read_meta(folder: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The ``meta.json`` of a cache folder, or ``None`` if the folder isn't a whole cache."""
    itemsize = tokenizer.dtype(0).itemsize
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for part in ("train", "validation"):
            size = (folder / f"{part}.npy").stat().st_size
            if size != meta[part]["tokens"] * itemsize:
                return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return meta


def _write_cache(
    target: Path, documents: Iterator[Document], spec: SourceSpec, tokenizer: Tokenizer
) -> dict[str, Any]:
    draft = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        draft.mkdir(parents=True)
        meta = {
            "version": _FORMAT_VERSION,
            "kind": spec.builtin or "text",
            "dtype": np.dtype(tokenizer.dtype).name,
            **_write_parts(draft, documents, tokenizer),
        }
        with (draft / "meta.json").open("w") as file:
            json.dump(meta, file, indent=2)
            _flush(file)
        _sync_folder(draft)
        _publish(draft, target, tokenizer)
    except OSError as e:
        raise OLMoConfigurationError(
            f"cache: '{target.parent}' can't be written to ({e.strerror or e}); it must be a "
            "folder with write permission and room for the tokens."
        ) from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return meta


def _write_parts(
    folder: Path, documents: Iterator[Document], tokenizer: Tokenizer
) -> dict[str, dict[str, int]]:
    eos = np.array([tokenizer.config.eos_token_id], dtype=tokenizer.dtype)
    last = None
    with (folder / "0.npy").open("wb") as file_0, (folder / "1.npy").open("wb") as file_1:
        train, validation = _Part(file_0), _Part(file_1)
        for key, text, _ in documents:
            ids = np.concatenate((tokenizer.encode(text), eos))
            last = ids, len(text.encode("utf-8", "replace"))
            (validation if is_held_out(key) else train).add(*last)
        if last is None:
            raise _Problem("path", "there is no document with text in it; at least one is needed")
        if not train.tokens:
            train, validation = validation, train
        if not validation.tokens:
            _hold_out_last(train, validation, *last)
        return {
            "train": train.finish(folder / "train.npy"),
            "validation": validation.finish(folder / "validation.npy"),
        }


def _hold_out_last(train: _Part, validation: _Part, ids: np.ndarray, text_bytes: int) -> None:
    """Move the last document, or the end of the only one, to the validation part."""
    if train.documents > 1:
        train.documents -= 1
    else:
        num_ids = len(ids) - 1
        held_out = max(1, num_ids // _HELD_OUT_ONE_IN)
        if num_ids <= held_out:
            raise _Problem("path", "the only document is too short to split; give more text")
        text_bytes = round(text_bytes * held_out / num_ids)
        ids = ids[-held_out - 1 :]
    train.tokens -= len(ids)
    train.text_bytes -= text_bytes
    train.file.truncate(train.tokens * ids.itemsize)
    validation.add(ids, text_bytes)


def _publish(draft: Path, target: Path, tokenizer: Tokenizer) -> None:
    try:
        os.rename(draft, target)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process was faster, or somebody left a folder that isn't a whole cache.
        if _read_meta(target, tokenizer) is None:
            shutil.rmtree(target)
            os.rename(draft, target)
    _sync_folder(target.parent)


def _flush(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_cache(
    name: str, folder: Path, meta: dict[str, Any], tokenizer: Tokenizer
) -> TokenizedSource:
    train, validation = meta["train"], meta["validation"]
    return TokenizedSource(
        name=name,
        train_tokens=train["tokens"],
        validation_tokens=validation["tokens"],
        train_documents=train["documents"],
        validation_documents=validation["documents"],
        validation_bytes=validation["text_bytes"],
        _tokenizer=tokenizer,
        _train=_Span((folder / "train.npy",), 0, train["tokens"]),
        _validation=_Span((folder / "validation.npy",), 0, validation["tokens"]),
    )


def _open_tokens(name: str, paths: list[Path], tokenizer: Tokenizer) -> TokenizedSource:
    sizes = [_check_tokens(path, tokenizer) for path in paths]
    total = sum(sizes)
    if total < 2:
        raise _Problem("path", f"{total} tokens are too few to split; at least 2 are needed")
    split = _find_split(paths, sizes, tokenizer)
    return TokenizedSource(
        name=name,
        train_tokens=split,
        validation_tokens=total - split,
        train_documents=None,
        validation_documents=None,
        validation_bytes=None,
        _tokenizer=tokenizer,
        _train=_Span(tuple(paths), 0, split),
        _validation=_Span(tuple(paths), split, total),
    )


def _check_tokens(path: Path, tokenizer: Tokenizer) -> int:
    """Check a ``.npy`` file and return its number of tokens."""
    dtype, vocab_size = np.dtype(tokenizer.dtype), tokenizer.config.vocab_size
    with _reading(path):
        with path.open("rb") as file:
            magic = file.read(6)
        size = path.stat().st_size
        if magic == b"\x93NUMPY":
            raise _Problem(
                "path",
                f"'{path}' was written by numpy.save, but OLMo-core reads raw arrays of token "
                "ids; write it with 'array.tofile(path)' instead",
            )
        if size == 0 or size % dtype.itemsize:
            raise _Problem(
                "path",
                f"'{path}' has {size} bytes, which must be a multiple, but not 0, of the "
                f"{dtype.itemsize} that a {dtype.name} takes (the type for a vocab_size of "
                f"{vocab_size})",
            )
        tokens = np.memmap(path, dtype=dtype, mode="r")
        # All of a large file would take minutes, and a wrong type shows anywhere.
        largest = max(int(tokens[:_WINDOW].max()), int(tokens[-_WINDOW:].max()))
    if largest >= vocab_size:
        raise _Problem(
            "path",
            f"'{path}' has token id {largest} when read as {dtype.name}, but must have only ids "
            f"below the vocab_size of {vocab_size} of tokenizer '{tokenizer.name}'",
        )
    return len(tokens)


def _find_split(paths: list[Path], sizes: list[int], tokenizer: Tokenizer) -> int:
    """The index, in all files taken as one array, of the first token that is held out."""
    total = sum(sizes)
    split = total - max(1, total // _HELD_OUT_ONE_IN)
    start = 0
    for path, size in zip(paths, sizes):
        # OLMo-core takes the beginning of a file for the beginning of a document.
        if start >= split:
            return start
        if start + size > split:
            with _reading(path):
                tokens = np.memmap(path, dtype=tokenizer.dtype, mode="r")
                border = _find_document_start(tokens, split - start, tokenizer)
            if border is not None:
                return start + border
        start += size
    return split


def _find_document_start(tokens: np.ndarray, begin: int, tokenizer: Tokenizer) -> int | None:
    eos, bos = tokenizer.config.eos_token_id, tokenizer.config.bos_token_id
    for start in range(begin, len(tokens), _WINDOW):
        stop = min(start + _WINDOW, len(tokens))
        borders = tokens[start - 1 : stop - 1] == eos
        if bos is not None:
            borders &= tokens[start:stop] == bos
        if borders.any():
            return start + int(borders.argmax())
    return None
