"""Protocols on tiny files of the true formats: prompts, predictions of a tiny model, folders and scores."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image as PILImage

from tfusion.bench import coco, geneval, protocols
from tfusion.callbacks.writer import PredictionWriter
from tfusion.data.prompts import read_prompts
from tfusion.requests import GenerationConfig

PICTURES = 12
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def run(*arguments: object) -> int:
    return protocols.main([str(argument) for argument in arguments])


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def annotations(tmp_path) -> Path:
    """As COCO's captions_val2014.json: five captions a picture, in no order, one with a line end."""
    images = [{"id": 100 + 7 * n, "file_name": f"COCO_val2014_{100 + 7 * n:012d}.jpg"} for n in range(PICTURES)]
    captions = [
        {"image_id": image["id"], "id": 1000 + 5 * n + k, "caption": f"Caption {k} of picture {image['id']}.\n"}
        for n, image in enumerate(images)
        for k in range(5)
    ]
    captions = [captions[i] for i in np.random.default_rng(0).permutation(len(captions))]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": captions}))
    return path


@pytest.fixture
def karpathy(tmp_path) -> Path:
    """As dataset_coco.json, with its pictures in coco/val2014."""
    (tmp_path / "coco/val2014").mkdir(parents=True)
    entries = []
    for n, split in enumerate(["train", "test", "restval", "test", "val", "test"]):
        name = f"COCO_val2014_{n:012d}.jpg"
        PILImage.new("RGB", (12, 10), (40 * n, 0, 0)).save(tmp_path / "coco/val2014" / name)
        sentences = [{"tokens": ["a"], "raw": f"A cat number {n} on sofa {k}. ", "sentid": 5 * n + k} for k in range(5)]
        entries.append({"filepath": "val2014", "filename": name, "split": split, "sentences": sentences, "cocoid": n})
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"dataset": "coco", "images": entries}))
    return path


@pytest.fixture
def metadata(tmp_path) -> Path:
    """As GenEval's evaluation_metadata.jsonl."""
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "counting",
            "include": [{"class": "clock", "count": 2}],
            "exclude": [{"class": "clock", "count": 3}],
            "prompt": "a photo of two clocks",
        },
        {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"},
    ]
    return write_lines(tmp_path / "evaluation_metadata.jsonl", lines)


def test_coco_prompts_are_one_caption_each_of_different_pictures(annotations, tmp_path, capsys) -> None:
    out = tmp_path / "new/coco.jsonl"
    assert run("coco", "--annotations", annotations, "--number", 8, "--out", out) == 0
    requests = read_prompts(out, GenerationConfig())
    assert [(r.generate, r.seed, r.n) for r in requests] == [("image", i, 1) for i in range(8)]
    texts = [r.segments[0] for r in requests]
    of = [text.split()[-1] for text in texts]
    assert len(set(of)) == 8
    known = {" ".join(a["caption"].split()) for a in json.loads(annotations.read_text())["annotations"]}
    assert set(texts) <= known, "a line end at the end of a caption is gone"
    assert json.loads(capsys.readouterr().out)["blank_captions_left_out"] == 0


def test_the_draw_is_a_function_of_the_seed_and_uniform(annotations, tmp_path) -> None:
    first, _ = coco.image_requests(annotations, PICTURES, 3)
    content = json.loads(annotations.read_text())
    content["annotations"].reverse()
    other_order = tmp_path / "other.json"
    other_order.write_text(json.dumps(content))
    assert coco.image_requests(other_order, PICTURES, 3)[0] == first, "the order of the file is nothing"
    assert coco.image_requests(annotations, 5, 3)[0] == first[:5], "fewer are the first of more"
    captions, pictures, numbers = Counter(), Counter(), 400
    for seed in range(numbers):
        for request in coco.image_requests(annotations, 3, seed)[0]:
            words = request["segments"][0].split()
            captions[words[1]] += 1
            pictures[words[-1]] += 1
    # Multinomial: within four standard deviations.
    for counts, kinds in ((captions, 5), (pictures, PICTURES)):
        expected = 3 * numbers / kinds
        assert len(counts) == kinds
        assert max(abs(count - expected) for count in counts.values()) < 4 * np.sqrt(expected)


def test_blank_captions_are_left_out_and_counted(annotations, tmp_path, capsys) -> None:
    content = json.loads(annotations.read_text())
    for annotation in content["annotations"]:
        if annotation["image_id"] == 100:
            annotation["caption"] = " \n"
    annotations.write_text(json.dumps(content))
    assert run("coco", "--annotations", annotations, "--number", 11, "--out", tmp_path / "p.jsonl") == 0
    assert json.loads(capsys.readouterr().out)["blank_captions_left_out"] == 5
    assert run("coco", "--annotations", annotations, "--number", 12, "--out", tmp_path / "p.jsonl") == 2
    assert "got --number 12, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "expected an object with 'annotations'"),
        ('{"images": []}', "no key 'annotations'; it has ['images']"),
        (
            '{"annotations": [{"image_id": 1, "id": 2, "caption": "x"}, {"id": 3, "caption": "y"}]}',
            "annotations[1]: no",
        ),
        ('{"annotations": [{"image_id": 1, "id": 2, "caption": 5}]}', "annotations[0]: 'caption' is 5, expected str"),
        ('{"annotations": []}', "has captions of 0 pictures"),
    ],
)
def test_wrong_annotations_are_named(content, message, tmp_path, capsys) -> None:
    (tmp_path / "a.json").write_text(content)
    assert run("coco", "--annotations", tmp_path / "a.json", "--out", tmp_path / "p.jsonl") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


def test_caption_requests_find_their_pictures(karpathy, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a relative folder, and prompts that lie elsewhere
    out = tmp_path / "elsewhere/captions.jsonl"
    assert run("coco-captions", "--split", karpathy, "--images", "coco", "--out", out) == 0
    requests = read_prompts(out, GenerationConfig(temperature=1.0))
    assert [r.generate for r in requests] == ["text"] * 3
    assert all(r.config.temperature == 0 for r in requests)
    reds = [r.segments[0].getpixel((5, 5))[0] for r in requests]
    assert reds == pytest.approx([40, 120, 200], abs=3), "pictures 1, 3 and 5, of the test split, in their order"


def test_pictures_or_splits_that_are_missing_are_said(karpathy, tmp_path, capsys) -> None:
    def refused(*more: object) -> str:
        assert run("coco-captions", "--split", karpathy, "--out", tmp_path / "p.jsonl", *more) == 2
        return capsys.readouterr().err

    assert "splits are ['restval', 'test', 'train', 'val']" in refused("--images", "coco", "--name", "tset")
    error = refused("--images", tmp_path / "coco/val2014")
    assert "3 of 3 pictures are not there" in error and "holds val2014/" in error
    content = json.loads(karpathy.read_text())
    del content["images"][3]["sentences"]
    karpathy.write_text(json.dumps(content))
    assert "images[3]: no key 'sentences'" in refused("--images", tmp_path / "coco")


@pytest.fixture
def scorer(monkeypatch) -> list:
    """A stand-in for `tfusion.metrics.captions` that scores by length, and what it was called with."""
    calls = []
    module = ModuleType("tfusion.metrics.captions")

    def cider_d(written, references):
        calls.append((list(written), list(references)))
        return np.array([len(text) for text in written], dtype=float)

    module.cider_d = cider_d
    monkeypatch.setitem(sys.modules, "tfusion.metrics.captions", module)
    return calls


def test_cider_joins_by_request_number(karpathy, scorer, tmp_path, capsys) -> None:
    lines = [
        {"request": 2, "sample": 0, "segments": [{"text": "three"}]},
        {"request": 0, "sample": 0, "segments": [{"text": "o"}, {"text": "ne"}]},
        {"request": 1, "sample": 0, "segments": []},
    ]
    path = write_lines(tmp_path / "predictions.jsonl", lines)
    assert run("cider", "--split", karpathy, "--predictions", path) == 0
    [(written, references)] = scorer
    assert written == ["one", "", "three"]
    assert references[0] == tuple(f"A cat number 1 on sofa {k}." for k in range(5))
    assert [r[0].split()[3] for r in references] == ["1", "3", "5"]
    # 300, 0 and 500: mean 266.67, standard deviation 251.66
    expected = {"cider_d": 266.67, "standard_error": 145.3, "n": 3, "empty": 1}
    assert json.loads(capsys.readouterr().out) == expected


def test_cider_with_the_scorer_itself(karpathy, tmp_path, capsys) -> None:
    """True captions in the order of the requests score more than the same in another order."""
    pytest.importorskip("tfusion.metrics.captions")
    scores = []
    for order in ([1, 3, 5], [3, 5, 1]):
        lines = [
            {"request": i, "sample": 0, "segments": [{"text": f"a cat number {n} on sofa 0"}]}
            for i, n in enumerate(order)
        ]
        path = write_lines(tmp_path / "predictions.jsonl", lines)
        assert run("cider", "--split", karpathy, "--predictions", path) == 0
        scores.append(json.loads(capsys.readouterr().out)["cider_d"])
    assert scores[0] > 100 > scores[1]


def prediction(request: int, sample: int, *segments: dict) -> dict:
    return {"request": request, "sample": sample, "segments": list(segments) or [{"text": "x"}]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([prediction(0, 0), prediction(2, 0)], "lacks 1 of 3 samples (request 1 sample 0)"),
        ([prediction(0, 0), prediction(1, 0), prediction(1, 0)], "line 3: request 1, sample 0 is there twice"),
        ([prediction(n, 0) for n in range(4)], "line 4: request 3, sample 0, but 3 requests of 1 samples"),
        ([prediction(0, 0), {"request": 1, "segments": []}], "line 2: no key 'sample'"),
        ([prediction(0, 0, {"words": "x"})], "line 1: segment {'words': 'x'}"),
        ([prediction(0, 0), [1]], "line 2: got list, expected an object"),
        ([], "is empty"),
    ],
)
def test_wrong_predictions_are_named(lines, message, karpathy, scorer, tmp_path, capsys) -> None:
    path = write_lines(tmp_path / "predictions.jsonl", lines)
    assert run("cider", "--split", karpathy, "--predictions", path) == 2
    assert message in capsys.readouterr().err
    assert not scorer


def test_geneval_end_to_end(metadata, tmp_path, byte_tokenizer, tiny_module, tiny_data, tiny_trainer) -> None:
    """Prompts, predictions of a tiny model, the folder; its pictures are those of their prompts."""
    prompts = tmp_path / "geneval.jsonl"
    assert run("geneval", "--metadata", metadata, "--out", prompts, "--samples", 2) == 0
    requests = read_prompts(prompts, GenerationConfig())
    lines = [json.loads(line) for line in metadata.read_text().splitlines()]
    assert [(r.segments, r.generate, r.n) for r in requests] == [((line["prompt"],), "image", 2) for line in lines]
    module = tiny_module(generation=GenerationConfig(num_inference_steps=2, max_new_tokens=2))
    module.text_tokenizer = byte_tokenizer
    trainer = tiny_trainer(1, callbacks=[PredictionWriter()])
    trainer.predict(module, tiny_data(prompts=prompts), return_predictions=False)
    predictions, out = tmp_path / "predictions", tmp_path / "images"
    command = ("geneval-folder", "--metadata", metadata, "--predictions", predictions, "--out", out)
    assert run(*command, "--samples", 2) == 0
    assert sorted(path.name for path in out.iterdir()) == ["00000", "00001", "00002"]
    for n, line in enumerate(lines):
        assert json.loads((out / f"{n:05d}/metadata.jsonl").read_text()) == line
        names = sorted(path.name for path in (out / f"{n:05d}/samples").iterdir())
        assert names == ["0000.png", "0001.png"]
        for k, name in enumerate(names):
            own = (predictions / f"{n:06d}-{k}-0.png").read_bytes()
            assert (out / f"{n:05d}/samples" / name).read_bytes() == own
    assert len({path.read_bytes() for path in out.glob("*/samples/*.png")}) == 6, "all differ"


def test_geneval_folder_refuses_what_is_not_whole(metadata, tmp_path, capsys) -> None:
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    pictures = [(n, k) for n in range(3) for k in range(4)]
    lines = [prediction(n, k, {"image": f"{n:06d}-{k}-0.png"}) for n, k in pictures]
    for n, k in pictures:
        PILImage.new("RGB", (4, 4), (n, k, 0)).save(predictions / f"{n:06d}-{k}-0.png")

    def refused(changed: list, out: Path = tmp_path / "out") -> str:
        write_lines(predictions / "predictions.jsonl", changed)
        assert run("geneval-folder", "--metadata", metadata, "--predictions", predictions, "--out", out) == 2
        return capsys.readouterr().err

    assert "lacks 1 of 12 samples (request 2 sample 3)" in refused(lines[:-1])
    assert "request 0, sample 1 of" in refused([lines[0], prediction(0, 1, {"text": "no picture"}), *lines[2:]])
    (predictions / "000001-2-0.png").rename(tmp_path / "away.png")
    assert "request 1, sample 2 of" in refused(lines)
    assert not (tmp_path / "out").exists(), "nothing is written before all is known to be there"
    (tmp_path / "away.png").rename(predictions / "000001-2-0.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/old.png").touch()
    assert "full is not empty" in refused(lines, tmp_path / "full")
    (predictions / "predictions.jsonl").unlink()
    assert run("geneval-folder", "--metadata", metadata, "--predictions", predictions, "--out", tmp_path / "o") == 2
    assert "predictions.jsonl does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (
            '{"tag": "colors", "include": [], "prompt": "a"}\n\n{"tag": "colors", "include": []}\n',
            "line 3: no key 'prompt'",
        ),
        ('{"tag": "colors", "include": [], "prompt": " "}\n', "line 1: 'prompt' is empty"),
        ('{"tag": "colors", "include": [], "prompt": "a"}\nnothing\n', "line 2: not JSON"),
    ],
)
def test_wrong_metadata_is_named(text, message, tmp_path, capsys) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    assert run("geneval", "--metadata", tmp_path / "m.jsonl", "--out", tmp_path / "p.jsonl") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


def test_geneval_summary_against_pandas(tmp_path, capsys) -> None:
    """Groups and means of a data frame, as GenEval's own summary takes them."""
    draws = np.random.default_rng(0)
    rows = []
    for prompt in range(40):
        tag = KINDS[int(draws.integers(len(KINDS)))]
        line = json.dumps({"tag": tag, "prompt": f"p{prompt}"})
        for sample in range(4):
            correct = bool(draws.random() < 0.4)
            rows.append({"filename": f"{sample}.png", "tag": tag, "correct": correct, "reason": "", "metadata": line})
    frame = pd.DataFrame(rows)
    path = tmp_path / "results.jsonl"
    frame.to_json(path, orient="records", lines=True)
    assert run("geneval-summary", "--results", path) == 0
    found = json.loads(capsys.readouterr().out)
    by_tag = frame.groupby("tag", sort=False)["correct"]
    assert list(found["tags"]) == list(by_tag.mean().index)
    assert {t: v["accuracy"] for t, v in found["tags"].items()} == pytest.approx(by_tag.mean().to_dict())
    assert {t: (v["right"], v["n"]) for t, v in found["tags"].items()} == {t: (g.sum(), len(g)) for t, g in by_tag}
    assert found["overall"] == pytest.approx(by_tag.mean().mean())
    assert found["overall"] != pytest.approx(frame["correct"].mean())
    assert found["correct_images"] == pytest.approx(frame["correct"].mean())
    assert found["correct_prompts"] == pytest.approx(frame.groupby("metadata")["correct"].any().mean())
    assert (found["images"], found["prompts"]) == (160, 40)


def test_wrong_results_are_named(tmp_path, capsys) -> None:
    good = {"tag": "colors", "correct": True, "metadata": "{}"}
    path = write_lines(tmp_path / "results.jsonl", [good, good | {"correct": "yes"}])
    assert run("geneval-summary", "--results", path) == 2
    assert "line 2: 'correct' is 'yes', expected bool" in capsys.readouterr().err
    with pytest.raises(ValueError, match="line 1: no key 'tag'"):
        geneval.summary(write_lines(path, [{"correct": True, "metadata": "{}"}]))
