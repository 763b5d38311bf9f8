import errno
import gzip
import json
import multiprocessing
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import zstandard
from olmo_core.exceptions import OLMoConfigurationError

from mixture_pretraining_stages import sources
from mixture_pretraining_stages.sources import (
    Document,
    SourceSpec,
    TokenizedSource,
    is_held_out,
    prepare_source,
    read_documents,
)
from mixture_pretraining_stages.tokenizers import load_tokenizer

BYTES = load_tokenizer("bytes")
EOS = BYTES.config.eos_token_id
TINY = load_tokenizer({"vocab_size": 100, "eos_token_id": 0, "pad_token_id": 1})


def prepare(path, cache_dir, tokenizer=BYTES, **kwargs) -> TokenizedSource:
    spec = path if isinstance(path, SourceSpec) else SourceSpec(path=path)
    return prepare_source("web", spec, tokenizer, cache_dir, **kwargs)


def tokens(source: TokenizedSource, part: str, work_dir: Path) -> np.ndarray:
    """All tokens of a part, read the way a data loader does."""
    instances = getattr(source, f"{part}_instances")(1, work_dir)
    return np.concatenate([instance["input_ids"] for instance in instances])


def documents_in(ids: np.ndarray) -> list[str]:
    """The texts of a part tokenised as bytes, which has to end with a whole document."""
    assert ids[-1] == EOS
    return [
        part[part != EOS].astype(np.uint8).tobytes().decode()
        for part in np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]
    ]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def write_npy(path: Path, ids: list[int] | np.ndarray, dtype=np.uint8) -> Path:
    np.asarray(ids, dtype=dtype).tofile(path)
    return path


def error_of(path, cache_dir, tokenizer=BYTES) -> str:
    with pytest.raises(OLMoConfigurationError) as error:
        prepare(path, cache_dir, tokenizer)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="session")
def code() -> list[Document]:
    return list(read_documents(SourceSpec(builtin="python-code")))


@pytest.fixture(scope="session")
def docs() -> list[Document]:
    return list(read_documents(SourceSpec(builtin="python-docs")))


def test_code_has_the_modules_of_the_standard_library_sorted(code):
    keys = [document.key for document in code]
    assert keys == sorted(set(keys))
    assert {"json", "json.decoder", "asyncio.tasks", "os"} <= set(keys)
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [key for key in keys if excluded & set(key.split("."))]
    with open(os.__file__, encoding="utf-8") as file:
        assert {d.key: d.text for d in code}["os"] == file.read()


def test_docs_have_docstrings_under_their_qualified_names(docs):
    texts = {document.key: document.text for document in docs}
    assert len(texts) == len(docs)
    assert texts["json.decoder"].startswith("json.decoder\nImplementation of JSONDecoder\n")
    assert (
        "\n\njson.decoder.JSONDecoder.raw_decode\nDecode a JSON document" in texts["json.decoder"]
    )
    assert texts["topics.assert"].startswith('The "assert" statement')
    assert all(document.text for document in docs)


def test_same_modules_are_held_out_in_both_builtins(code, docs):
    held_out = {d.key for d in code if is_held_out(d.key)}
    train = {d.key for d in code} - held_out
    modules = [d.key for d in docs if not d.key.startswith("topics.")]
    assert 0.02 < len(held_out) / len(code) < 0.09
    assert {key for key in modules if is_held_out(key)} & train == set()
    assert {key for key in modules if not is_held_out(key)} & held_out == set()
    assert {key for key in modules if is_held_out(key)} & held_out


def test_no_topic_is_in_the_code(code, docs):
    assert [d.key for d in docs if d.key.startswith("topics.") and is_held_out(d.key)]
    assert "pydoc_data.topics" not in {d.key for d in code}


def test_code_is_split_as_its_keys_say(code, tmp_path):
    calls: list[tuple[str, int, int]] = []
    spec = SourceSpec(builtin="python-code")
    source = prepare(spec, tmp_path, progress=lambda *call: calls.append(call))
    for part, held_out in (("train", False), ("validation", True)):
        expected = [d.text for d in code if is_held_out(d.key) is held_out]
        (path,) = tmp_path.glob(f"python-code-*/{part}.npy")
        assert documents_in(np.memmap(path, dtype=np.uint16, mode="r")) == expected
        assert getattr(source, f"{part}_documents") == len(expected)
    num_bytes = sum(len(d.text.encode()) for d in code if is_held_out(d.key))
    assert source.validation_bytes == num_bytes
    assert source.bytes_per_token() == num_bytes / source.validation_tokens
    assert calls == sorted(calls)
    assert calls[0][0] == "web"
    assert calls[-1][1] == calls[-1][2]
    assert len(calls) <= 201


def test_module_with_undecodable_source_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text("# coding: latin-1\n# é", encoding="latin-1")
    (tmp_path / "bad.py").write_bytes(b"# \xff")
    (tmp_path / "unknown.py").write_text("# coding: klingon")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "sub.py").write_text("'''Tests.'''")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("if 1:\n  def f():\n    'Does\\d nothing.'")
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    keys = [d.key for d in read_documents(SourceSpec(builtin="python-code"))]
    assert keys == ["broken", "good", "pkg"]
    (document,) = read_documents(SourceSpec(builtin="python-docs"))
    assert (document.key, document.text) == ("pkg", "pkg.f\nDoes\\d nothing.")


def test_documents_of_files_are_held_out_by_key(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    source = prepare(str(tmp_path / "a.jsonl"), tmp_path / "cache")
    held_out = [t for i, t in enumerate(texts, start=1) if is_held_out(f"a.jsonl:{i}")]
    assert documents_in(tokens(source, "validation", tmp_path)) == held_out
    train = documents_in(tokens(source, "train", tmp_path))
    assert train == [text for text in texts if text not in held_out]
    assert (source.train_documents, source.validation_documents) == (len(train), len(held_out))
    assert source.validation_bytes == sum(map(len, held_out))


def test_keys_are_relative_to_what_was_given(tmp_path):
    for name in ("d/a.txt", "d/sub/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def keys(path):
        return [d.key for d in read_documents(SourceSpec(path=path))]

    assert keys(str(tmp_path / "d")) == ["a.txt", "sub/b.txt"]
    assert keys(str(tmp_path / "d" / "**" / "*.txt")) == ["a.txt", "sub/b.txt"]
    assert keys(str(tmp_path / "*")) == ["d/a.txt", "d/sub/b.txt"]
    assert keys([str(tmp_path / "d/sub/b.txt"), str(tmp_path / "d/a.txt")]) == ["b.txt", "a.txt"]
    assert keys([str(tmp_path / "d"), str(tmp_path / "d/a.txt")]) == ["a.txt", "sub/b.txt"]


def test_folder_ignores_other_endings_and_files_named_like_patterns_work(tmp_path):
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "a[1].txt").write_text("x")
    for path in (tmp_path, tmp_path / "a[1].txt"):
        assert [d.key for d in read_documents(SourceSpec(path=str(path)))] == ["a[1].txt"]


def test_compression_changes_neither_tokens_nor_split(tmp_path):
    texts = [f"text {i} é" for i in range(100)]
    data = write_jsonl(tmp_path / "a.jsonl", texts, field="body").read_bytes()
    half = len(data) // 2
    zstd = zstandard.ZstdCompressor()
    compressed = {
        "a.jsonl": data,
        "a.jsonl.gz": gzip.compress(data[:half]) + gzip.compress(data[half:]),
        "a.jsonl.zst": zstd.compress(data[:half]) + zstd.compress(data[half:]),
    }
    results = []
    for name, content in compressed.items():
        (tmp_path / name).write_bytes(content)
        spec = SourceSpec(path=str(tmp_path / name), text_field="body")
        source = prepare(spec, tmp_path / "cache")
        results.append([tokens(source, p, tmp_path).tolist() for p in ("train", "validation")])
    assert results[0] == results[1] == results[2]
    assert sorted(documents_in(np.array(results[0][0] + results[0][1]))) == sorted(texts)


def test_blank_lines_and_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\r\n{"text": "two"}')
    source = prepare(str(tmp_path / "a.jsonl"), tmp_path / "cache")
    assert documents_in(tokens(source, "train", tmp_path)) == ["one"]
    assert documents_in(tokens(source, "validation", tmp_path)) == ["two"]


@pytest.mark.parametrize("all_held_out", [False, True])
def test_last_document_is_held_out_if_all_or_none_would_be(all_held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "is_held_out", lambda key: all_held_out)
    write_jsonl(tmp_path / "a.jsonl", ["first", "second", "thé third"])
    source = prepare(str(tmp_path / "a.jsonl"), tmp_path / "cache")
    assert documents_in(tokens(source, "train", tmp_path)) == ["first", "second"]
    assert documents_in(tokens(source, "validation", tmp_path)) == ["thé third"]
    (meta,) = (tmp_path / "cache").glob("text-*/meta.json")
    assert json.loads(meta.read_text()) == {
        "version": 1,
        "kind": "text",
        "dtype": "uint16",
        "train": {"tokens": 13, "documents": 2, "text_bytes": 11},
        "validation": {"tokens": 11, "documents": 1, "text_bytes": 10},
    }
    assert (source.train_documents, source.validation_documents) == (2, 1)
    assert source.validation_bytes == 10


@pytest.mark.parametrize("all_held_out", [False, True])
def test_end_of_the_only_document_is_held_out(all_held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "is_held_out", lambda key: all_held_out)
    text = "".join(chr(97 + i % 26) for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    source = prepare(str(tmp_path / "a.txt"), tmp_path / "cache")
    assert documents_in(tokens(source, "validation", tmp_path)) == [text[190:]]
    assert tokens(source, "train", tmp_path).astype(np.uint8).tobytes().decode() == text[:190]
    assert source.validation_bytes == 10
    assert (source.train_tokens, source.validation_tokens) == (190, 11)


def test_large_file_is_read_in_constant_memory(tmp_path):
    line = json.dumps({"text": "x" * 4000}) + "\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", compresslevel=1) as file:
        for _ in range(4000):
            file.write(line)
    tracemalloc.start()
    source = prepare(str(tmp_path / "a.jsonl.gz"), tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source.train_tokens + source.validation_tokens == 4000 * 4001
    assert peak < 2_000_000


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two files of a document each."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("first document")
    (folder / "b.txt").write_text("second document")
    return folder


def state(cache_dir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache_dir.rglob("*")}


def test_second_call_does_not_write(folder, tmp_path):
    cache = tmp_path / "cache"
    first = prepare(str(folder), cache)
    before = state(cache)
    calls: list[tuple] = []
    assert prepare(str(folder), cache, progress=lambda *call: calls.append(call)) == first
    assert state(cache) == before
    assert {path.name for path in before} > {"train.npy", "validation.npy", "meta.json"}
    assert not calls


@pytest.mark.parametrize("change", ["content", "mtime", "file", "field", "tokenizer"])
def test_change_makes_another_cache(change, folder, tmp_path):
    cache, spec, tokenizer = tmp_path / "cache", SourceSpec(path=str(folder)), BYTES
    prepare(spec, cache)
    if change == "content":
        (folder / "a.txt").write_text("first document, longer")
    elif change == "mtime":
        os.utime(folder / "a.txt", ns=(1, 1))
    elif change == "file":
        (folder / "c.txt").write_text("x")
    elif change == "field":
        spec.text_field = "body"
    else:
        path = write_word_tokenizer(tmp_path / "tokenizer.json")
        tokenizer = load_tokenizer(str(path))
    prepare(spec, cache, tokenizer)
    assert len(list(cache.iterdir())) == 2


def write_word_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "document": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_tokens_are_those_of_the_tokenizer(folder, tmp_path):
    tokenizer = load_tokenizer(str(write_word_tokenizer(tmp_path / "tokenizer.json")))
    source = prepare(str(folder), tmp_path / "cache", tokenizer)
    assert tokens(source, "validation", tmp_path).tolist() == [2, 1, 0]
    assert source.bytes_per_token() == len("second document") / 3


def test_builtin_cache_depends_on_sizes_but_not_on_times(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "lib" / name).write_text("pass")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    spec, cache = SourceSpec(builtin="python-code"), tmp_path / "cache"
    prepare(spec, cache)
    os.utime(tmp_path / "lib" / "a.py", ns=(1, 1))
    prepare(spec, cache)
    assert len(list(cache.iterdir())) == 1
    (tmp_path / "lib" / "a.py").write_text("pass # longer")
    prepare(spec, cache)
    monkeypatch.setattr(sources.platform, "python_version", lambda: "3.99.0")
    prepare(spec, cache)
    assert len(list(cache.iterdir())) == 3


def test_killed_writer_leaves_nothing_that_is_used(folder, tmp_path):
    cache = tmp_path / "cache"
    pid = os.fork()
    if pid == 0:
        prepare(str(folder), cache, progress=lambda *call: os._exit(9))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    (left,) = cache.iterdir()
    assert left.suffix == ".tmp"
    source = prepare(str(folder), cache)
    assert documents_in(tokens(source, "train", tmp_path)) == ["first document"]
    assert {path.suffix for path in cache.iterdir()} == {".tmp", ""}


@pytest.mark.parametrize("damage", ["no meta", "bad meta", "cut off"])
def test_damaged_cache_is_written_anew(damage, folder, tmp_path):
    cache = tmp_path / "cache"
    source = prepare(str(folder), cache)
    (target,) = cache.iterdir()
    if damage == "no meta":
        (target / "meta.json").unlink()
    elif damage == "bad meta":
        (target / "meta.json").write_text('{"train": 3}')
    else:
        os.truncate(target / "train.npy", 4)
    assert prepare(str(folder), cache) == source
    assert documents_in(tokens(source, "train", tmp_path)) == ["first document"]
    assert list(cache.iterdir()) == [target]


def test_failed_writer_cleans_up(folder, tmp_path):
    def fail(*call):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        prepare(str(folder), tmp_path / "cache", progress=fail)
    assert not list((tmp_path / "cache").iterdir())


def test_two_writers_at_once_both_succeed(folder, tmp_path):
    barrier, results = threading.Barrier(2), []

    def work():
        waited: list[int] = []

        def wait_once(*call):
            if not waited:
                waited.append(barrier.wait(timeout=10))

        results.append(prepare(str(folder), tmp_path / "cache", progress=wait_once))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert results[0] == results[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def run_ranks(tmp_path, path) -> list[str]:
    """What two processes of one group get out of a source, in the order of their ranks."""

    def work(rank, queue):
        os.environ["LOCAL_RANK"] = str(rank)
        os.environ.pop("FS_LOCAL_RANK", None)
        store = f"file://{tmp_path}/rendezvous"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        if rank == 1:
            sources._write_cache = None  # type: ignore[assignment]
        try:
            source = prepare(path, tmp_path / "cache")
            shape = len(source.train_instances(4, tmp_path)), source.validation_tokens
            queue.put((rank, str(shape)))
        except OLMoConfigurationError as e:
            queue.put((rank, str(e)))
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=work, args=(rank, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    return [results[0], results[1]]


def test_only_the_first_rank_writes(folder, tmp_path):
    assert run_ranks(tmp_path, str(folder)) == ["(3, 16)"] * 2


def test_error_of_the_writer_is_raised_on_all_ranks(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    first, second = run_ranks(tmp_path, str(tmp_path / "a.jsonl"))
    assert first == second
    assert "line 1 isn't JSON" in first


def test_full_disk_is_an_error_that_names_the_folder(folder, tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources.os, "fsync", fail)
    message = error_of(str(folder), tmp_path / "cache")
    assert message.startswith("cache: ")
    assert str(tmp_path / "cache") in message
    assert "No space left" in message
    assert not list((tmp_path / "cache").iterdir())


def test_cache_that_cannot_be_written_to_is_an_error(folder, tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(str(folder), tmp_path / "file" / "cache")
    assert message.startswith("cache: ")
    assert str(tmp_path / "file" / "cache") in message


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        (SourceSpec(), "builtin", ["neither"]),
        (SourceSpec(builtin="python-code", path="x"), "builtin", ["both"]),
        (SourceSpec(builtin="java"), "builtin", ["'java'", "python-code, python-docs"]),
        (SourceSpec(builtin=["python-code"]), "builtin", ["['python-code']"]),  # type: ignore
        (SourceSpec(path=[]), "path", ["[]"]),
        (SourceSpec(path="x" * 5000), "path", ["xxx"]),
        (SourceSpec(path=""), "path", ["''"]),
        (SourceSpec(path=7), "path", ["7"]),
        (SourceSpec(path=["x", 7]), "path", ["7"]),
        (SourceSpec(path="x", text_field=""), "text_field", ["''"]),
        (SourceSpec(path="no/such.txt"), "path", ["'no/such.txt'", "doesn't exist"]),
        (SourceSpec(path="no/such*.txt"), "path", ["'no/such*.txt'", ".jsonl.zst, .npy"]),
        (SourceSpec(path="https://x.org/a.txt"), "path", ["https://x.org/a.txt", "local"]),
    ],
)
def test_wrong_spec_is_an_error_that_names_field_and_value(spec, field, words, tmp_path):
    message = error_of(spec, tmp_path / "cache")
    assert message.startswith(f"sources.web.{field}: ")
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["JSON"]),
        ("[" * 100_000, ["JSON"]),
        ("3", ["object", "'text'"]),
        ('{"body": "x"}', ["'text'", "missing"]),
        ('{"text": null}', ["'text'", "isn't a string"]),
        ("\udcff", ["JSON"]),
    ],
)
def test_wrong_line_is_an_error_that_names_file_line_and_field(line, words, tmp_path):
    content = f'{{"text": "x"}}\n\n{line}\n'.encode("utf-8", "surrogateescape")
    for name, data in (("a.jsonl", content), ("b.jsonl.zst", zstandard.compress(content))):
        (tmp_path / name).write_bytes(data)
        message = error_of(str(tmp_path / name), tmp_path / "cache")
        assert message.startswith("sources.web.path: ")
        assert all(word in message for word in [f"'{tmp_path / name}'", "line 3", *words])
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut off", "not compressed", "flipped"])
def test_damaged_compressed_file_is_an_error_that_names_it(damage, ending, tmp_path):
    data = b"".join(b'{"text": "number %d"}\n' % i for i in range(3000))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    compressed = gzip.compress(data) if ending == "gz" else compressor.compress(data)
    if damage == "cut off":
        compressed = compressed[:-1]
    elif damage == "not compressed":
        compressed = data
    else:
        middle = len(compressed) // 2
        compressed = compressed[:middle] + bytes(8) + compressed[middle + 8 :]
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(compressed)
    assert str(path) in error_of(str(path), tmp_path / "cache")


def test_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert f"'{tmp_path / 'a.txt'}'" in error_of(str(tmp_path / "a.txt"), tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "nowhere")
    message = error_of(str(tmp_path / "data"), tmp_path / "cache")
    assert f"'{tmp_path / 'data' / 'b.txt'}'" in message


def test_unknown_endings_and_mixed_kinds_are_errors(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    assert ".txt, .jsonl," in error_of(str(tmp_path / "a.csv"), tmp_path / "cache")
    assert "a.csv" in error_of(str(tmp_path / "a.*"), tmp_path / "cache")
    write_npy(tmp_path / "a.npy", [1, 2, 3])
    assert "mixes" in error_of(str(tmp_path), tmp_path / "cache")


def test_folder_without_any_known_file_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    assert "matches no local file" in error_of(str(tmp_path), tmp_path / "cache")


@pytest.mark.parametrize(("content", "words"), [("", "no document"), ("x", "too short")])
def test_source_without_enough_text_is_an_error(content, words, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    assert words in error_of(str(tmp_path / "a.txt"), tmp_path / "cache")


def test_text_needs_a_tokenizer_that_can_encode(folder, tmp_path):
    message = error_of(str(folder), tmp_path / "cache", TINY)
    assert message.startswith("sources.web.path: ")
    assert "tokenizer.identifier" in message


def test_npy_is_split_at_a_document_border_without_a_copy(tmp_path):
    ids = np.full(1000, 7)
    ids[[100, 960, 980, 999]] = 0
    path = write_npy(tmp_path / "a.npy", ids)
    before = state(tmp_path)
    source = prepare(str(path), tmp_path / "cache", TINY)
    assert state(tmp_path) == before
    assert (source.train_tokens, source.validation_tokens) == (961, 39)
    assert tokens(source, "train", tmp_path).tolist() == ids[:961].tolist()
    assert tokens(source, "validation", tmp_path).tolist() == ids[961:].tolist()
    assert source.train_documents is source.validation_documents is None
    assert source.validation_bytes is source.bytes_per_token() is None


@pytest.mark.parametrize(
    ("eos_at", "expected"),
    [([], 950), ([100, 999], 950), ([949], 950), ([950], 951), ([956, 960], 957), ([998], 999)],
)
def test_npy_is_split_at_the_first_border_or_by_count(eos_at, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_WINDOW", 7)
    ids = np.full(1000, 7)
    ids[eos_at] = 0
    source = prepare(str(write_npy(tmp_path / "a.npy", ids)), tmp_path / "cache", TINY)
    assert source.train_tokens == expected


def test_npy_border_needs_the_bos_token_if_there_is_one(tmp_path):
    tokenizer = load_tokenizer(
        {"vocab_size": 100, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 2}
    )
    ids = np.full(1000, 7)
    ids[[960, 970, 971]] = [0, 0, 2]
    source = prepare(str(write_npy(tmp_path / "a.npy", ids)), tmp_path / "cache", tokenizer)
    assert source.train_tokens == 971


def test_several_npy_files_are_split_as_one(tmp_path):
    parts = [np.arange(2, 42), np.full(55, 50), np.full(5, 51)]
    for i, part in enumerate(parts):
        write_npy(tmp_path / f"{i}.npy", part)
    source = prepare(str(tmp_path / "*.npy"), tmp_path / "cache", TINY)
    assert (source.train_tokens, source.validation_tokens) == (95, 5)
    assert tokens(source, "validation", tmp_path).tolist() == [51] * 5
    assert tokens(source, "train", tmp_path).tolist() == np.concatenate(parts)[:95].tolist()
    # Here the last file begins after the last 5 %, so the split is moved to its beginning.
    write_npy(tmp_path / "1.npy", np.full(60, 50))
    write_npy(tmp_path / "2.npy", np.full(2, 51))
    assert prepare(str(tmp_path), tmp_path / "cache", TINY).train_tokens == 100
    # And here a document in the file before it does.
    write_npy(tmp_path / "1.npy", np.where(np.arange(60) == 57, 0, 50))
    assert prepare(str(tmp_path), tmp_path / "cache", TINY).train_tokens == 98


def test_npy_errors_name_the_file_and_what_is_wrong(tmp_path):
    tokenizer = load_tokenizer({"vocab_size": 300, "eos_token_id": 0, "pad_token_id": 1})
    path = tmp_path / "a.npy"

    def message() -> str:
        message = error_of(str(path), tmp_path / "cache", tokenizer)
        assert message.startswith("sources.web.path: ")
        assert f"'{path}'" in message
        return message

    np.save(path, np.arange(10, dtype=np.uint16))
    assert "tofile" in message()
    path.write_bytes(b"123")
    assert all(word in message() for word in ("3 bytes", "uint16", "300"))
    path.write_bytes(b"")
    assert "0 bytes" in message()
    write_npy(path, [5, 300, 7], np.uint16)
    assert all(word in message() for word in ("token id 300", "uint16", "vocab_size of 300"))
    write_npy(path, np.arange(299, dtype=np.uint32), np.uint32)
    prepare(str(path), tmp_path / "cache", tokenizer)
    write_npy(path, [3], np.uint16)
    with pytest.raises(OLMoConfigurationError, match="too few to split"):
        prepare(str(path), tmp_path / "cache", tokenizer)


def test_wrong_id_at_the_end_of_a_large_file_is_found(tmp_path):
    ids = np.zeros(2_100_000, dtype=np.uint8)
    ids[-1] = 100
    path = write_npy(tmp_path / "a.npy", ids)
    assert "token id 100" in error_of(str(path), tmp_path / "cache", TINY)


def test_instances_have_the_shape_and_content_of_the_tokens(tmp_path):
    texts = [f"the text of document {i}" for i in range(100)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    source = prepare(str(tmp_path / "a.jsonl"), tmp_path / "cache")
    for part in ("train", "validation"):
        instances = getattr(source, f"{part}_instances")(16, tmp_path)
        expected = tokens(source, part, tmp_path)
        assert instances.label == "web"
        assert len(instances) == len(expected) // 16
        assert all(np.shape(instance["input_ids"]) == (16,) for instance in instances)
        ids = np.concatenate([instance["input_ids"] for instance in instances])
        assert ids.tolist() == expected[: len(ids)].tolist()


@pytest.mark.parametrize("part", ["train", "validation"])
def test_part_shorter_than_an_instance_is_an_error(part, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 200)
    source = prepare(str(tmp_path / "a.txt"), tmp_path / "cache")
    size = getattr(source, f"{part}_tokens")
    build = getattr(source, f"{part}_instances")
    assert len(build(size, tmp_path)) == 1
    with pytest.raises(OLMoConfigurationError, match=f"^sequence_length: {size + 1} .*{part}"):
        build(size + 1, tmp_path)
