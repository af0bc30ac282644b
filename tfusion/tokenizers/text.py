"""Text <-> ids: byte-level BPE of the `tokenizers` library, its ids moved up past the special ones.

Ids 0-4 (pad, bos, eos, boi, eoi) belong to `tfusion.sequence` and are no tokens here: the text "<bos>" is
five plain bytes, so nothing a user types can end a document. All 256 bytes are in the alphabet, so every text
round-trips.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tfusion.sequence import NUM_SPECIAL_IDS

log = logging.getLogger(__name__)

RECIPE = 1  # raised when `_train` changes, so that tokenizers cached by an older recipe are not used
SMALLEST_VOCAB_SIZE = NUM_SPECIAL_IDS + 256


class TextTokenizer:
    """Encode text as ids `>= 5`, decode ids as text; made by `train`, `from_file` or `from_json`.

    `vocab_size` is what the model's embedding needs: the declared size, special ids included. A small corpus
    may support fewer merges than declared; the ids above the learned ones are then never encoded and decode
    to nothing.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int | None = None) -> None:
        """Wrap a library tokenizer.

        Args:
            tokenizer: any tokenizer of the `tokenizers` library; its special tokens, padding, truncation and
                templates are switched off.
            vocab_size: declared size with the 5 special ids; None = highest id + 1.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # the text "<|endoftext|>" is text, not the token of that name
        used = NUM_SPECIAL_IDS + 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_size = used if vocab_size is None else vocab_size
        if self.vocab_size < used:
            raise ValueError(f"vocab_size {vocab_size} is declared for a tokenizer of {used} ids; give at least {used}")
        self._tokenizer = tokenizer

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, cache_dir: str | os.PathLike[str] | None = None
    ) -> TextTokenizer:
        """Learn merges of pairs seen at least twice; a pure function of `texts` and `vocab_size`.

        The result is kept under a hash of both, so a second call reads it back. Without any text only the
        bytes are tokens.

        Args:
            texts: the corpus; walked through twice, or held in memory if it is a one-way iterator.
            vocab_size: declared size, at least 261 = 5 special ids + 256 bytes.
            cache_dir: None = `$TFUSION_CACHE`, else `~/.cache/tfusion`.
        """
        if vocab_size < SMALLEST_VOCAB_SIZE:
            raise ValueError(
                f"got vocab_size {vocab_size}, expected at least {SMALLEST_VOCAB_SIZE}: "
                f"{NUM_SPECIAL_IDS} special ids and 256 bytes"
            )
        if not isinstance(texts, Sequence):
            texts = list(texts)
        folder = Path(cache_dir or os.environ.get("TFUSION_CACHE") or "~/.cache/tfusion").expanduser()
        path = folder / f"tokenizer-{_content_hash(texts, vocab_size)}.json"
        cached = _read_cache(path)
        if cached is not None:
            return cached
        tokenizer = cls(_train(texts, vocab_size - NUM_SPECIAL_IDS), vocab_size)
        _write_cache(path, tokenizer)
        return tokenizer

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Load any `tokenizer.json`; its id `i` becomes our `i + 5`."""
        if not Path(path).is_file():
            raise ValueError(f"no tokenizer file {str(path)!r}; give the path of a tokenizer.json")
        return cls(_parse(Path(path).read_text(encoding="utf-8"), str(path)))

    @classmethod
    def from_json(cls, text: str) -> TextTokenizer:
        """The inverse of `to_json`."""
        try:
            stored = json.loads(text)
            vocab_size, inner = stored["vocab_size"], json.dumps(stored["tokenizer"], ensure_ascii=False)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"not a tfusion tokenizer ({type(error).__name__}: {error}); expected what to_json() gave, "
                "use from_file() for a tokenizer.json"
            ) from error
        return cls(_parse(inner, "the stored tokenizer"), vocab_size)

    def to_json(self) -> str:
        """Everything there is to know, as one line of JSON: declared size and the library's own form."""
        stored = {"vocab_size": self.vocab_size, "tokenizer": json.loads(self._tokenizer.to_str())}
        return json.dumps(stored, ensure_ascii=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `to_json()`, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, each `5 <= id < vocab_size`; no special ids are added."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i + NUM_SPECIAL_IDS for i in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[i + NUM_SPECIAL_IDS for i in encoding.ids] for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: special ids are left out, bytes that are no UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        wrong = sorted({i for i in ids if not 0 <= i < self.vocab_size})
        if wrong:
            raise ValueError(
                f"got ids {wrong[:10]}, expected 0 <= id < {self.vocab_size}: "
                "decode with the tokenizer that the model was trained with"
            )
        kept = [i - NUM_SPECIAL_IDS for i in ids if i >= NUM_SPECIAL_IDS]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def num_bytes(self, token_id: int) -> int:
        """UTF-8 bytes that an id `>= 5` stands for, 0 for one that was declared but not learned."""
        token = self._tokenizer.id_to_token(token_id - NUM_SPECIAL_IDS)
        if token is None:
            return 0
        if isinstance(self._tokenizer.decoder, decoders.ByteLevel):
            return len(token)  # its alphabet writes each byte as one character
        return len(self.decode([token_id]).encode())

    def __reduce__(self) -> tuple:
        # The library's own pickle forgets `encode_special_tokens`.
        return TextTokenizer.from_json, (self.to_json(),)


def _train(texts: Iterable[str], num_tokens: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _parse(text: str, source: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{source} is not a tokenizer.json of the tokenizers library: {error}") from error


def _content_hash(texts: Iterable[str], vocab_size: int) -> str:
    digest = hashlib.sha256(json.dumps({"recipe": RECIPE, "vocab_size": vocab_size}).encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))  # else ["ab"] and ["a", "b"] would be one corpus
        digest.update(data)
    return digest.hexdigest()[:32]


def _read_cache(path: Path) -> TextTokenizer | None:
    if not path.is_file():
        return None
    try:
        return TextTokenizer.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        log.warning("cached tokenizer %s is unreadable and is trained again: %s", path, error)
        return None


def _write_cache(path: Path, tokenizer: TextTokenizer) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
        os.replace(temporary, path)  # other ranks see the whole file or none
    except OSError as error:
        log.warning("the tokenizer cannot be cached (set TFUSION_CACHE to a writable folder): %s", error)


# DataLoader workers are forked from a process in which the library may have used its thread pool. A fork
# inherits the pool without its threads: used there, it waits for ever. The library looks for this variable
# when it is forked and at every batch; set across the fork, it makes the child serial (and silences the
# library's own warning).
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_parallelism_of_parent: list[str | None] = []


def _before_fork() -> None:
    _parallelism_of_parent.append(os.environ.get(_PARALLELISM))
    os.environ[_PARALLELISM] = "false"


def _after_fork_in_parent() -> None:
    value = _parallelism_of_parent.pop()
    if value is None:
        del os.environ[_PARALLELISM]
    else:
        os.environ[_PARALLELISM] = value


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
