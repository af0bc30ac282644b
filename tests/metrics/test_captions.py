"""CIDEr-D against pycocoevalcap on its own tokens and against the paper's equations; tokens against Stanford's."""

from __future__ import annotations

import math
import os
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from tfusion.metrics.captions import caption_tokens, cider_d

WORDS = ("a", "the", "red", "blue", "dog", "cat", "boy", "runs", "sits", "on", "in", "front", "of", "grass", "house")


def captions(count: int, seed: int = 0) -> list[tuple[str, ...]]:
    """Of each picture one to four captions of one to nine words."""
    draw = random.Random(seed)
    return [
        tuple(" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 4)))
        for _ in range(count)
    ]


def by_the_paper(written: list[str], references: list[tuple[str, ...]]) -> list[float]:
    """CIDEr-D's equations, n-gram by n-gram (Vedantam et al. 2015, section 8.2, with counts as the authors' code)."""

    def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    pictures = [[reference.split() for reference in some] for some in references]
    scores = []
    for candidate, some in zip([caption.split() for caption in written], pictures, strict=True):
        total = 0.0
        for n in (1, 2, 3, 4):
            for reference in some:
                counts = [Counter(grams(words, n)) for words in (candidate, reference)]

                def weight(gram: tuple[str, ...], n: int = n) -> float:
                    with_it = sum(any(gram in grams(words, n) for words in picture) for picture in pictures)
                    return math.log(len(pictures) / max(1, with_it))

                vectors = [{gram: count * weight(gram) for gram, count in c.items()} for c in counts]
                norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
                product = sum(min(vectors[0][g], vectors[1][g]) * vectors[1][g] for g in vectors[0] if g in vectors[1])
                if min(norms) > 0:
                    penalty = math.exp(-((len(candidate) - len(reference)) ** 2) / (2 * 6**2))
                    total += penalty * product / (norms[0] * norms[1])
        scores.append(10 * total / 4 / len(some))
    return scores


def test_equals_pycocoevalcap_on_the_same_tokens() -> None:
    references = [(f"{first}, Don't!", *rest) for first, *rest in captions(40)]
    written = [f"A {some[0]}." for some in captions(40, seed=1)]
    tokens = {i: [" ".join(caption_tokens(caption)) for caption in some] for i, some in enumerate(references)}
    own = {i: [" ".join(caption_tokens(caption))] for i, caption in enumerate(written)}
    mean, each = Cider().compute_score(tokens, own)
    scores = cider_d(written, references)
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, each)
    assert scores.mean() == mean > 0.1


def test_equals_the_papers_equations() -> None:
    references, written = captions(25), [some[0] for some in captions(25, seed=1)]
    written[:4] = [references[0][0], references[1][0], "unheard of words", "dog"]
    np.testing.assert_allclose(cider_d(written, references), by_the_paper(written, references), rtol=1e-10, atol=1e-12)


def test_a_perfect_caption_scores_ten_and_an_empty_one_nothing() -> None:
    references = [("a red dog runs fast",), ("two blue cats sit here",), ("the old house burns down",)]
    scores = cider_d([references[0][0], "", "  . "], references)
    assert scores == pytest.approx([10.0, 0.0, 0.0], abs=1e-12)


def test_what_cannot_be_weighted_scores_zero() -> None:
    assert cider_d(["a red dog"], [("a red dog",)]).tolist() == [0.0]
    assert cider_d(["a", "b"], [(".",), ("",)]).tolist() == [0.0, 0.0]
    assert cider_d([], []).shape == (0,)


def test_wrong_numbers_of_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 written captions and references of 1 pictures"):
        cider_d(["a", "b"], [("a",)])
    with pytest.raises(ValueError, match=r"references\[1\] is \(\), expected a tuple of one caption"):
        cider_d(["a", "b"], [("a",), ()])
    with pytest.raises(ValueError, match=r"references\[0\] is 'a', expected a tuple"):
        cider_d(["a", "b"], ["a", "b"])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog's owner can't run , don’t you ?", "a dog 's owner ca n't run do n't you"),
        ('Two "big" T-shirts (red) -- cost $5.00', "two big t-shirts -lrb- red -rrb- cost $ 5.00"),
        ("We cannot stop; it's 3:30 p.m. in the U.S. now...", "we can not stop it 's 3:30 p.m. in the u.s. now"),
        ("Mr. Smith's 5-year-old, 5 o'clock", "mr. smith 's 5-year-old 5 o'clock"),
        ("...", ""),
    ],
)
def test_tokens(text: str, tokens: str) -> None:
    """Each is what the real tokenizer gives."""
    assert caption_tokens(text) == tokens.split()


@pytest.mark.skipif("TFUSION_DATA" not in os.environ, reason="needs the benchmark data: TFUSION_DATA")
@pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokenizer is a Java program")
def test_tokens_are_stanfords_on_real_captions() -> None:
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    if not (folder / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR).is_file() or not os.access(folder, os.W_OK):
        pytest.skip("the tokenizer's jar is not here, or it cannot write beside it")
    found = []
    shards = sorted(Path(os.environ["TFUSION_DATA"], "flickr8k").glob("**/*.tar"))
    if not shards:
        pytest.skip("TFUSION_DATA has no flickr8k")
    for shard in shards:
        with tarfile.open(shard) as files:
            texts = [files.extractfile(file).read().decode() for file in files if file.name.endswith(".txt")]
        found += [line for text in texts for line in text.splitlines()]
    assert len(found) > 30_000
    theirs = ptbtokenizer.PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(found)})
    wrong = [line for i, line in enumerate(found) if " ".join(caption_tokens(line)) != theirs[i][0]]
    assert len(wrong) < 0.001 * len(found), wrong[:10]
