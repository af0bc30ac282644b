"""The text tokenizer round-trips every text, knows no special token, and is the same wherever trained."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from tfusion.tokenizers import TextTokenizer

WORDS = ["red heart", "black cat", "the red cat", "To be, or not to be: that is the question.\n"]
TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS]
SPECIALS = "<pad><bos><eos><boi><eoi><|endoftext|>[BOS] <s></s>"
HARD = [
    "",
    " ",
    "  two  spaces \t\r\n\n end ",
    SPECIALS,
    "na\u00efve cafe\u0301 \u65e5\u672c \U0001f600\U0001f468\u200d\U0001f469",
    "\x00\x01\x7f\x80\xff\ufeff\uffff",
    "".join(map(chr, range(0x250))),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 300, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("text", HARD)
def test_every_text_round_trips_without_special_ids(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(5 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode([0, 1, *ids, 2, 3, 4]) == text


def test_batch_equals_one_by_one(tokenizer: TextTokenizer) -> None:
    texts = HARD + TEXTS
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_merges_are_learned(tokenizer: TextTokenizer) -> None:
    text = "To be, or not to be"
    assert len(tokenizer.encode(text)) < len(text) / 1.5
    # A byte that no merge touches is one token: ids 5..260 are the bytes.
    assert len(tokenizer.encode("\u65e5")) == 3
    assert max(tokenizer.encode("\u65e5")) < 5 + 256


def test_declared_size_holds_when_the_corpus_supports_fewer_merges(tmp_path: Path) -> None:
    tokenizer = TextTokenizer.train(["ab", "ab"], 1000, tmp_path)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode("ab") == [5 + 256]  # the one merge there is
    assert tokenizer.decode([999, *tokenizer.encode("ab")]) == "ab"
    assert TextTokenizer.train([], 261, tmp_path).encode("a") == TextTokenizer.train([""], 261, tmp_path).encode("a")


def test_invalid_utf8_is_replaced_and_wrong_ids_are_named(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("\u65e5")
    assert tokenizer.decode(ids[:1] + tokenizer.encode("x")) == "\ufffdx"
    with pytest.raises(ValueError, match=r"\[-1, 300\].*0 <= id < 300"):
        tokenizer.decode([7, 300, -1])


def test_too_small_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got vocab_size 260, expected at least 261"):
        TextTokenizer.train(TEXTS, 260, tmp_path)


def test_copies_are_equal(tokenizer: TextTokenizer) -> None:
    # The library's own tokens named like special ones must stay text in a copy, too.
    inner = tokenizers.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    inner.add_special_tokens(["<bos>"])
    for original in (tokenizer, TextTokenizer(inner)):
        for other in (
            TextTokenizer.from_json(original.to_json()),
            pickle.loads(pickle.dumps(original)),
            copy.deepcopy(original),
        ):
            assert other.encode_batch(HARD) == original.encode_batch(HARD)
            assert other.vocab_size == original.vocab_size
            assert other.fingerprint == original.fingerprint
    assert tokenizer.fingerprint != TextTokenizer(inner).fingerprint
    assert TextTokenizer(inner).encode("<bos>") == tokenizer.encode("<bos>")


def test_training_is_a_function_of_texts_and_size(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    code = (
        "import sys; from tfusion.tokenizers import TextTokenizer; texts = sys.stdin.read().split('\\0')\n"
        "sys.stdout.write(TextTokenizer.train(iter(texts), 300).fingerprint)"
    )
    for parallel, seed in (("false", "1"), ("true", "2")):
        environment = os.environ | {
            "TFUSION_CACHE": str(tmp_path / seed),
            "TOKENIZERS_PARALLELISM": parallel,
            "PYTHONHASHSEED": seed,
        }
        command = [sys.executable, "-c", code]
        out = subprocess.run(
            command, input="\0".join(TEXTS), env=environment, capture_output=True, text=True, check=True
        )
        assert out.stdout == tokenizer.fingerprint


def test_cache_is_by_content_and_a_corrupt_file_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TFUSION_CACHE", str(tmp_path))
    first = TextTokenizer.train(TEXTS, 300)
    (file,) = tmp_path.iterdir()  # no temporary file is left
    content = file.read_bytes()

    monkeypatch.setattr("tfusion.tokenizers.text._train", lambda *_: pytest.fail("trained again"))
    assert TextTokenizer.train(iter(TEXTS), 300).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("TFUSION_CACHE", str(tmp_path))

    for broken in (content[:100], b"", b"[1]", b'{"vocab_size": 3, "tokenizer": {}}', b"\xff\xfe"):
        file.write_bytes(broken)
        assert TextTokenizer.train(TEXTS, 300).fingerprint == first.fingerprint
        assert "unreadable" in caplog.text
        assert file.read_bytes() == content

    for texts, size in ((TEXTS, 301), (TEXTS[::-1], 300), (["".join(TEXTS)], 300)):
        before = len(list(tmp_path.iterdir()))
        TextTokenizer.train(texts, size)
        assert len(list(tmp_path.iterdir())) == before + 1


def test_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert TextTokenizer.train(TEXTS, 300, tmp_path / "file" / "cache").encode("red")
    assert "TFUSION_CACHE" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_worker_encodes_although_the_parent_used_its_threads(tokenizer: TextTokenizer) -> None:
    # In a fresh interpreter: a fork of the test process would inherit its other threads.
    code = """
import os, sys
from tfusion.tokenizers import TextTokenizer
tokenizer = TextTokenizer.from_json(sys.stdin.read())
texts = ["red heart"] * 500
expected = tokenizer.encode_batch(texts)
for _ in range(2):
    child = os.fork()
    if child == 0:
        os._exit(0 if tokenizer.encode_batch(texts) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
"""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}  # the library's own guard is off then
    command = [sys.executable, "-c", code]
    out = subprocess.run(
        command,
        input=tokenizer.to_json(),
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert out.returncode == 0
    assert out.stderr == ""


def test_foreign_tokenizer_is_shifted(tmp_path: Path) -> None:
    if "TFUSION_DATA" not in os.environ:
        pytest.skip("TFUSION_DATA is not set")
    path = Path(os.environ["TFUSION_DATA"], "gpt2_tokenizer", "tokenizer.json")
    tokenizer = TextTokenizer.from_file(path)
    assert tokenizer.encode("Hello world") == [15496 + 5, 995 + 5]
    assert tokenizer.vocab_size == 50257 + 5
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode("<|endoftext|>")) < 50256 + 5  # as plain text, not as the token of that name


def test_foreign_settings_do_not_leak(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer._tokenizer.to_str())
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.add_special_tokens(["<s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 295)])
    inner.save(str(tmp_path / "tokenizer.json"))
    foreign = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    assert foreign.encode_batch(HARD) == tokenizer.encode_batch(HARD)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer file"):
        TextTokenizer.from_file(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        TextTokenizer.from_file(tmp_path / "x.json")
    with pytest.raises(ValueError, match="not a tfusion tokenizer"):
        TextTokenizer.from_json('{"a": 1}')
