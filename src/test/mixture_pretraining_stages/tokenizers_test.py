import json
import socket
from pathlib import Path

import numpy as np
import pytest
from olmo_core.data import TokenizerConfig
from olmo_core.data.composable import NumpyDocumentSource
from olmo_core.exceptions import OLMoConfigurationError
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, processors

from mixture_pretraining_stages.tokenizers import Tokenizer, load_tokenizer


def write_tokenizer_json(path: Path, *special_tokens: str, truncate: bool = False) -> Path:
    """A byte-level tokenizer: the 256 bytes, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HFTokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(special_tokens))
    if special_tokens:
        last = special_tokens[-1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{last} $A", special_tokens=[(last, tokenizer.token_to_id(last))]
        )
    if truncate:
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=16)
    tokenizer.save(str(path))
    return path


def mapping(**changes):
    return {"vocab_size": 300, "eos_token_id": 256, "pad_token_id": 257, **changes}


def test_bytes_round_trip():
    tokenizer = load_tokenizer("bytes")
    text = "naïve\n日本 \U0001f642\0"
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype == np.uint16
    assert ids.ndim == 1
    assert ids.astype(np.uint8).tobytes().decode("utf-8") == text
    assert len(tokenizer.encode("")) == 0


def test_bytes_special_ids_are_no_bytes():
    config = load_tokenizer("bytes").config
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (258, 256, 257)


def test_lone_surrogate_becomes_question_mark(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", "<eos>")
    for spec in ("bytes", str(path)):
        tokenizer = load_tokenizer(spec)
        assert tokenizer.encode("a\ud800b").tolist() == tokenizer.encode("a?b").tolist()


@pytest.mark.parametrize("vocab_size", [1, 256, 257, 2**16, 2**16 + 1, 100278, 2**32])
def test_dtype_is_the_one_olmo_core_reads(vocab_size):
    config = TokenizerConfig(vocab_size=vocab_size, eos_token_id=0, pad_token_id=0)
    expected = NumpyDocumentSource.Config(source_paths=[], tokenizer=config).get_dtype()
    assert Tokenizer(config, "x", "0").dtype is expected


def test_tokenizer_json_encodes_only_and_all_of_the_text(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", "<eos>", "<pad>", truncate=True)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.can_encode
    assert (tokenizer.config.vocab_size, tokenizer.dtype) == (258, np.uint16)
    assert (tokenizer.config.eos_token_id, tokenizer.config.pad_token_id) == (256, 257)
    text = "ends with <eos> and\n<pad>"
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert len(ids) == len(text)
    assert ids.max() < 256
    assert len(tokenizer.encode("abc")) == 3


def test_tokenizer_json_pads_with_eos_if_it_has_no_padding_token(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", "[SEP]", "<|endoftext|>")
    config = load_tokenizer(path).config
    assert config.eos_token_id == config.pad_token_id == 257


def test_tokenizer_json_without_eos_asks_for_mapping(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json")
    with pytest.raises(OLMoConfigurationError, match="^tokenizer: .*mapping.*eos_token_id"):
        load_tokenizer(str(path))
    tokenizer = load_tokenizer(mapping(identifier=str(path)))
    assert tokenizer.config.eos_token_id == 256
    assert len(tokenizer.encode("abc")) == 3


def test_vocabulary_size_covers_ids_after_a_gap(tmp_path):
    path = tmp_path / "tokenizer.json"
    HFTokenizer(models.WordLevel({"</s>": 0, "a": 7}, unk_token="</s>")).save(str(path))
    assert load_tokenizer(str(path)).config.vocab_size == 8


@pytest.mark.parametrize("identifier", [None, "allenai/dolma2-tokenizer"])
def test_mapping_without_local_file_needs_no_network_and_cannot_encode(identifier, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    tokenizer = load_tokenizer(mapping(identifier=identifier, bos_token_id=3))
    assert not tokenizer.can_encode
    assert tokenizer.config == TokenizerConfig(300, 256, 257, 3, identifier)
    with pytest.raises(OLMoConfigurationError, match="^tokenizer.identifier: .*tokenizer.json"):
        tokenizer.encode("text")


def test_fingerprint_changes_with_the_tokenizer_but_not_with_its_place(tmp_path):
    path = write_tokenizer_json(tmp_path / "a.json", "<eos>", "<pad>")
    copy = write_tokenizer_json(tmp_path / "b.json", "<eos>", "<pad>")
    other = write_tokenizer_json(tmp_path / "c.json", "<eos>", "<|pad|>")
    same = [
        load_tokenizer(str(path)),
        load_tokenizer(str(copy)),
        load_tokenizer(mapping(vocab_size=258, identifier=str(path))),
    ]
    different = [
        load_tokenizer(str(other)),
        load_tokenizer(mapping(vocab_size=258, eos_token_id=255, identifier=str(path))),
        load_tokenizer(mapping(vocab_size=258)),
        load_tokenizer(mapping(vocab_size=258, identifier="gpt2")),
        load_tokenizer("bytes"),
    ]
    assert len({tokenizer.fingerprint for tokenizer in same}) == 1
    assert len({tokenizer.fingerprint for tokenizer in same + different}) == 1 + len(different)
    int(same[0].fingerprint, 16)


@pytest.mark.parametrize(
    ("spec", "field", "value"),
    [
        (mapping(vocab_size=0), "tokenizer.vocab_size", "0"),
        (mapping(vocab_size=True), "tokenizer.vocab_size", "True"),
        (mapping(vocab_size=2**40), "tokenizer.vocab_size", str(2**40)),
        (mapping(eos_token_id=300), "tokenizer.eos_token_id", "300"),
        (mapping(eos_token_id="</s>"), "tokenizer.eos_token_id", "</s>"),
        (mapping(pad_token_id=-1), "tokenizer.pad_token_id", "-1"),
        (mapping(bos_token_id=300), "tokenizer.bos_token_id", "300"),
        (mapping(identifier=3), "tokenizer.identifier", "3"),
        (mapping(unk_token_id=3), "tokenizer.unk_token_id", "3"),
        ({"vocab_size": 10, "pad_token_id": 1}, "tokenizer", "eos_token_id"),
        ({}, "tokenizer", "vocab_size"),
        ("no/such/tokenizer.json", "tokenizer", "no/such/tokenizer.json"),
        ("x" * 5000, "tokenizer", "xxx"),
        (17, "tokenizer", "17"),
        (None, "tokenizer", "None"),
    ],
)
def test_wrong_spec_is_an_error_that_names_the_field_and_the_value(spec, field, value):
    with pytest.raises(OLMoConfigurationError) as error:
        load_tokenizer(spec)
    message = str(error.value)
    assert message.startswith(f"{field}: ")
    assert value in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"[1", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_file_that_is_no_tokenizer_json_is_an_error(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(OLMoConfigurationError, match="^tokenizer: .*tokenizer.json"):
        load_tokenizer(str(path))
    with pytest.raises(OLMoConfigurationError, match="^tokenizer.identifier: "):
        load_tokenizer(mapping(identifier=str(path)))


def test_empty_vocabulary_is_an_error(tmp_path):
    path = tmp_path / "tokenizer.json"
    HFTokenizer(models.BPE()).save(str(path))
    assert json.loads(path.read_text())["model"]["vocab"] == {}
    with pytest.raises(OLMoConfigurationError, match="^tokenizer: .*empty vocabulary"):
        load_tokenizer(str(path))


def test_vocabulary_larger_than_the_mapping_says_is_an_error(tmp_path):
    path = write_tokenizer_json(tmp_path / "tokenizer.json", "<eos>", "<pad>")
    spec = mapping(vocab_size=257, pad_token_id=256, identifier=str(path))
    with pytest.raises(OLMoConfigurationError, match="^tokenizer.vocab_size: 257 .* 258"):
        load_tokenizer(spec)
