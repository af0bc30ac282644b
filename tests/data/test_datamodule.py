"""The datamodule refuses what cannot work before any time is spent, and its position survives a checkpoint."""

from __future__ import annotations

import json
import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from PIL import Image as PILImage

from tfusion.data.corpora import CaptionedImage
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.sequence import BOI_ID, Batch


def corpus(name: str, documents: list, image_size: int | None = None) -> SimpleNamespace:
    made = SimpleNamespace(name=name, load=lambda split: documents)
    if image_size is not None:
        made.image_size = image_size
    return made


def captioned(*captions: str, size: int = 8) -> list[CaptionedImage]:
    return [CaptionedImage(str(n), torch.zeros(3, size, size, dtype=torch.uint8), (c,)) for n, c in enumerate(captions)]


# Refusals at construction


@pytest.mark.parametrize("name", ["image_share", "caption_first", "caption_drop", "image_first_noise_limit"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(tiny_data, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"data.{name} is {value}, expected a share between 0 and 1"):
        tiny_data(**{name: value})


@pytest.mark.parametrize(
    "name", ["seq_len", "rows_per_step", "lanes", "val_rows", "max_val_images", "predict_batch_size"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_a_size_below_1_is_refused(tiny_data, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"data.{name} is {value}, expected a whole number >= 1"):
        tiny_data(**{name: value})


def test_negative_workers_are_refused(tiny_data, tiny_module, attached) -> None:
    with pytest.raises(ValueError, match="num_workers"):
        attached(tiny_data(num_workers=-1), tiny_module())


def test_corpora_that_do_not_go_together_are_refused(tiny_data, tiny_module, attached, pictures, texts) -> None:
    with pytest.raises(ValueError, match="no corpus: give data.image_corpora, data.text_corpora or both"):
        MultimodalDataModule()
    with pytest.raises(ValueError, match="data.image_share is 0 with image corpora: raise it"):
        tiny_data(image_share=0.0)
    larger = corpus("larger", [], image_size=16)
    with pytest.raises(ValueError, match=r"several sizes \{'tiles': 8, 'larger': 16\}: give all the same"):
        attached(tiny_data(image_corpora=[pictures, larger]), tiny_module())
    with pytest.raises(ValueError, match=r"corpora of the same name in \['tiles', 'lines', 'lines'\]"):
        attached(tiny_data(text_corpora=[texts, texts]), tiny_module())
    with pytest.raises(ValueError, match=r"same name in \['tiles', 'tiles'\]"):
        attached(tiny_data(text_corpora=[corpus("tiles", [])]), tiny_module())


def test_missing_prompts_are_refused(tiny_data, tiny_module, attached, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"data.prompts is '.*gone.jsonl', which is no file"):
        tiny_data(prompts=str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="predict needs data.prompts"):
        attached(tiny_data(), tiny_module(), "predict")


# Refusals at set-up, against the model and the corpora


def test_a_vocabulary_that_is_not_the_models_is_refused(tiny_data, tiny_module, attached, tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match=r"tokenizer has 300 ids, the model's vocab_size is 261.*to 300.*to 261"):
        attached(tiny_data(vocab_size=300), tiny_module())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(byte_tokenizer.to_json())["tokenizer"]))
    data = attached(tiny_data(tokenizer_file=str(path)), tiny_module())
    assert data.tokenizer.encode("é") == byte_tokenizer.encode("é")
    with pytest.raises(ValueError, match="tokenizer has 261 ids, the model's vocab_size is 262"):
        attached(tiny_data(tokenizer_file=str(path)), tiny_module(vocab_size=262))


def test_sizes_that_do_not_fit_the_model_are_refused(tiny_data, tiny_module, attached) -> None:
    with pytest.raises(ValueError, match="data.seq_len 128 is longer than the model's max_seq_len 64"):
        attached(tiny_data(seq_len=128), tiny_module())
    sixteen = corpus("sixteen", captioned("a", "b", size=16), image_size=16)
    with pytest.raises(ValueError, match=r"16 x 16 become latents of \(3, 16, 16\).*latent_shape is \(3, 8, 8\)"):
        attached(tiny_data(image_corpora=[sixteen]), tiny_module())
    with pytest.raises(ValueError, match="data.seq_len 5 is shorter than one image of 4 patches.*at least 8"):
        attached(tiny_data(seq_len=5), tiny_module())
    with pytest.raises(ValueError, match="max_images_per_row is 11, but a row of 64 positions holds at most 10"):
        attached(tiny_data(max_images_per_row=11), tiny_module())


def test_image_documents_longer_than_a_row_are_refused_at_the_start(tiny_data, tiny_module, attached) -> None:
    long = corpus("long", captioned("short", "x" * 57), image_size=8)
    with pytest.raises(
        ValueError, match="an image document takes 65 positions, data.seq_len is 64: raise.*at least 65"
    ):
        attached(tiny_data(image_corpora=[long], caption_drop=0.0), tiny_module())
    fits = corpus("fits", captioned("short", "x" * 56), image_size=8)
    attached(tiny_data(image_corpora=[fits], caption_drop=0.0), tiny_module())


def test_pictures_measured_have_captions_that_fit_in_every_split(tiny_data, tiny_module, attached) -> None:
    """A longer one would be refused as a prompt, at the first measurement."""

    class Stored(list):
        def drop_long_captions(self, most: int, count_tokens):
            kept = [p for p in self if count_tokens(list(p.captions))[0] <= most]
            return Stored(kept), []

    data = attached(tiny_data(image_corpora=[corpus("own", Stored(captioned("a", "b" * 60, "c")), 8)]), tiny_module())
    for split in ("train", "val"):
        assert [p.captions[0] for p in data.measured_pictures(data.image_corpora[0], split)] == ["a", "c"]


def test_slots_that_cannot_hold_the_share_are_refused(tiny_data, tiny_module, attached) -> None:
    with pytest.raises(
        ValueError, match=r"max_images_per_row 1 fills about \d+% of a row, data.image_share asks for 90%"
    ):
        attached(tiny_data(max_images_per_row=1, image_share=0.9), tiny_module())


def test_slots_that_leave_rows_of_pictures_empty_are_refused(tiny_data, tiny_module, attached) -> None:
    """Without texts, rows are to be full of pictures, whatever image_share says; lowering that is no way out."""
    with pytest.raises(
        ValueError, match=r"max_images_per_row 2 .*100%: raise the former \(null: as many as it takes\)$"
    ):
        attached(tiny_data(text_corpora=[], max_images_per_row=2, image_share=0.5), tiny_module())


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("long", [False, True])
def test_slots_are_for_half_as_much_again_as_the_share_which_is_kept(
    tiny_data, tiny_module, pictures, attached, share: float, long: bool
) -> None:
    """Also beside a few pictures with captions of another length."""
    corpora, draws = [pictures], [picture.captions for picture in pictures.load("train")]
    if long:
        few = captioned("a caption that is quite long for a row", "and this is another one of the kind")
        corpora.append(corpus("few", few, image_size=8))
        draws += [picture.captions for picture in few]
    data = attached(tiny_data(image_corpora=corpora, image_share=share), tiny_module())
    mean = (
        fmean(fmean(len(caption.encode()) for caption in captions) for captions in draws) + 8
    )  # 4 patches; BOS ... EOS
    assert data.mixture.shape.max_images == math.ceil(1.5 * share * 64 / mean) < 64 // (4 + 2)
    held_out = next(iter(data.val_dataloader()[data.val_views.index("tiles")]))  # rows of nothing but pictures
    assert len(held_out.image_valid) == data.val_rows * math.ceil(64 / mean)
    steps = iter(data.train_dataloader())
    of_images = 0
    for _ in range(100):
        batch = next(steps)
        for row, ids in enumerate(batch.document_ids):  # a document with a picture is an image document
            with_picture = {int(ids[at]) for at in (batch.token_ids[row] == BOI_ID).nonzero().flatten().tolist()}
            of_images += sum(int((ids == document).sum()) for document in with_picture)
    assert of_images / (100 * 4 * 64) == pytest.approx(share, abs=0.01)


def test_a_resume_keeps_its_image_slots(tiny_data, tiny_module, attached) -> None:
    """They decide where rows end and which noise is drawn; checkpoints of before they were kept had as many as fit."""
    module = tiny_module()
    state = attached(tiny_data(), module).state_dict()
    attached(tiny_data(), module).load_state_dict(state)
    with pytest.raises(ValueError, match=f"max_images_per_row {state['max_images_per_row']}, this run has 9"):
        attached(tiny_data(max_images_per_row=9), module).load_state_dict(state)
    del state["max_images_per_row"]
    with pytest.raises(ValueError, match="trained with max_images_per_row 10, this run has"):
        attached(tiny_data(), module).load_state_dict(state)
    attached(tiny_data(max_images_per_row=10), module).load_state_dict(state)


@pytest.mark.parametrize("alone", [True, False])
def test_as_many_slots_as_fit_are_enough(tiny_data, tiny_module, attached, alone: bool, caplog) -> None:
    """Large images: one of 36 patches a row of 64, whatever image_share asks for; text fills the rest."""
    large = corpus("large", captioned("a", "bb", "ccc", size=24), image_size=24)
    module = tiny_module(latent_shape=(3, 24, 24))
    settings = {"text_corpora": []} if alone else {"image_share": 0.9}
    with caplog.at_level("INFO", "tfusion.data.building"):
        data = attached(tiny_data(image_corpora=[large], **settings), module)
    filled = f"fill about 66 % of rows of 64, where {100 if alone else 90} % is asked for"
    assert filled in caplog.text and ("stays empty" in caplog.text) == alone
    batch = next(iter(data.train_dataloader()))
    assert bool(batch.image_valid.all()) and data.mixture.shape.max_images == 1
    assert bool((batch.document_ids >= 0).all()) != alone


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_empty_corpora_are_refused(tiny_data, tiny_module, attached, documents: list[str]) -> None:
    with pytest.raises(ValueError, match="'nothing'"):
        data = attached(tiny_data(text_corpora=[corpus("nothing", documents)]), tiny_module())
        next(iter(data.train_dataloader()))


def test_an_empty_picture_corpus_is_refused(tiny_data, tiny_module, attached) -> None:
    with pytest.raises(ValueError, match="corpus 'none' has no document in its split 'train': give it more data"):
        attached(tiny_data(image_corpora=[corpus("none", [], image_size=8)]), tiny_module())


def test_an_empty_validation_split_is_refused(tiny_data, tiny_module, attached, texts) -> None:
    partial = SimpleNamespace(name="partial", load=lambda split: texts.load(split) if split == "train" else [])
    data = attached(tiny_data(text_corpora=[partial]), tiny_module())
    with pytest.raises(ValueError, match="corpus 'partial' has no document in its split 'val'"):
        data.val_dataloader()


@pytest.mark.parametrize(("layout", "message"), [({"accumulate": 3}, "take 3 rows"), ({"ranks": 8}, "take 8 rows")])
def test_a_layout_that_does_not_divide_the_rows_is_refused(tiny_data, tiny_module, attached, layout, message) -> None:
    with pytest.raises(ValueError, match=message):
        attached(tiny_data(), tiny_module(), **layout)


def test_an_autoencoder_is_asked_for_its_latents(tiny_data, tiny_module, attached) -> None:
    """The model's latent shape is compared with the image tokenizer's, not with pixels."""
    module = tiny_module()
    module.image_tokenizer = SimpleNamespace(latent_shape=lambda size: (4, size // 8, size // 8))
    with pytest.raises(ValueError, match=r"8 x 8 become latents of \(4, 1, 1\)"):
        attached(tiny_data(), module)


# Position


def consume(data: MultimodalDataModule, count: int) -> list[Batch]:
    """Micro-batches as a Trainer takes them."""
    batches = iter(data.train_dataloader())
    return [data.on_after_batch_transfer(next(batches), 0) for _ in range(count)]


def same(one: list[Batch], other: list[Batch]) -> bool:
    names = ("token_ids", "image_ids", "images", "noise", "time_uniforms", "noise_limits", "text_labels")
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in names)


@pytest.mark.parametrize(("accumulate", "ahead"), [(1, 4), (2, 2), (8, 1)])
def test_workers_run_ahead_by_rows_not_by_steps(tiny_data, tiny_module, attached, accumulate: int, ahead: int) -> None:
    """A worker makes whole steps, of however many micro-batches."""
    data = attached(tiny_data(num_workers=1, rows_per_step=8), tiny_module(), accumulate=accumulate)
    assert data.train_dataloader().steps.prefetch_factor == ahead


@pytest.mark.parametrize("accumulate", [1, 2])
def test_position_is_committed_at_whole_steps_and_goes_on(tiny_data, tiny_module, attached, accumulate: int) -> None:
    def fresh() -> MultimodalDataModule:
        return attached(tiny_data(), tiny_module(), accumulate=accumulate)

    whole = consume(fresh(), 10 * accumulate)
    data = fresh()
    consume(data, 3 * accumulate + accumulate // 2)  # in the middle of step 4
    state = json.loads(json.dumps(data.state_dict()))  # plain numbers and strings
    assert state["step"] == 3
    assert len(state["positions"]) == 8, "both lanes of 4 rows"
    state = data.state_dict()
    other = fresh()
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert same(consume(other, 7 * accumulate), whole[3 * accumulate :])


def test_only_training_commits(tiny_data, tiny_module, attached) -> None:
    data = attached(tiny_data(), tiny_module())
    data.trainer.training = False
    consume(data, 3)
    assert data.state_dict()["step"] == 0
    assert data.state_dict()["positions"] == {}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"seq_len": 48}, {"rows_per_step": 8}, {"lanes": 4}, {"image_share": 0.6}]
)
def test_other_settings_of_the_data_are_refused_on_a_resume(tiny_data, tiny_module, attached, change: dict) -> None:
    state = attached(tiny_data(), tiny_module()).state_dict()
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"was trained with {name} .*this run has {change[name]}"):
        attached(tiny_data(**change), tiny_module()).load_state_dict(state)


def test_other_documents_are_refused_on_a_resume(tiny_data, tiny_module, attached, texts, pictures) -> None:
    state = attached(tiny_data(), tiny_module()).state_dict()
    fewer = corpus("lines", texts.load("train")[:-1])
    with pytest.raises(ValueError, match="was trained with num_texts"):
        attached(tiny_data(text_corpora=[fewer]), tiny_module()).load_state_dict(state)
    fewer = corpus("tiles", pictures.load("train")[:-1], image_size=8)
    with pytest.raises(ValueError, match="was trained with num_pictures 11, this run has 10"):
        attached(tiny_data(image_corpora=[fewer]), tiny_module()).load_state_dict(state)
    state["tokenizer"] = "another"
    with pytest.raises(ValueError, match="was trained with tokenizer 'another'"):
        attached(tiny_data(), tiny_module()).load_state_dict(state)


# Validation, samples, prediction


def test_validation_is_one_loader_a_view_and_repeats(tiny_data, tiny_module, attached) -> None:
    data = attached(tiny_data(val_rows=2), tiny_module(), "validate")
    assert data.val_views == ["lines", "tiles", "tiles/given_image"]
    passes = [[list(loader) for loader in data.val_dataloader()] for _ in range(2)]
    assert len(passes[0]) == 3
    for one, other in zip(*passes, strict=True):
        assert len(one) >= 1
        assert same(one, other)
    assert not (passes[0][2][0].noise_limits[passes[0][2][0].image_valid]).any(), "given images are clean"


def test_validation_over_2_ranks_has_the_rows_of_1(tiny_data, tiny_module, attached) -> None:
    def rows(rank: int, ranks: int) -> list[list[tuple[list[int], torch.Tensor]]]:
        data = attached(tiny_data(val_rows=2), tiny_module(), "validate", rank, ranks)
        views = []
        for loader in data.val_dataloader():
            slots = data.val_shape.max_images
            views.append(
                [(ids.tolist(), n) for b in loader for ids, n in zip(b.token_ids, b.noise.split(slots), strict=True)]
            )
        return views

    for one, first, second in zip(rows(0, 1), rows(0, 2), rows(1, 2), strict=True):
        assert len(first) == len(second)
        merged = [row for pair in zip(first, second, strict=True) for row in pair]
        assert len(merged) % (2 * 2) == 0, "whole batches of 2 rows on both ranks"
        for (ids, noise), (ids_1, noise_1) in zip(merged, one):  # noqa: B905 (the last may be padding)
            assert ids == ids_1
            assert torch.equal(noise, noise_1)


def test_max_val_images_bounds_the_views_of_pictures(tiny_data, tiny_module, attached) -> None:
    data = attached(tiny_data(max_val_images=3), tiny_module(), "validate")
    valid = [sum(int(batch.image_valid.sum()) for batch in loader) for loader in data.val_dataloader()]
    assert valid == [0, 3, 3]


def test_sample_requests_are_fixed_and_of_three_kinds(tiny_data, tiny_module, attached, pictures) -> None:
    data = attached(tiny_data(), tiny_module())
    requests = data.sample_requests(3, 2, 4)
    assert requests == data.sample_requests(3, 2, 4)
    made, named, written = requests[:3], requests[3:5], requests[5:]
    first = pictures.load("train")
    assert [(r.segments, r.generate) for r in made] == [((p.captions[0],), "image") for p in first[:3]]
    for request, picture in zip(named, first, strict=False):
        assert request.generate == "text"
        given = request.segments[0]
        assert isinstance(given, PILImage.Image)
        assert given.getpixel((1, 5)) == tuple(picture.image[:, 5, 1].tolist())
    assert len(written) == 4
    held_out = "".join(data.text_corpora[0].load("val"))
    assert all(r.generate == "text" and r.segments[0] in held_out for r in written)
    assert data.sample_requests(0, 0, 0) == []
    assert len(data.sample_requests(99, 99, 0)) == 22


def test_predict_reads_requests_and_shares_them_out(tiny_data, tiny_module, attached, tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"segments": [f"{n}"]}) + "\n" for n in range(5)))
    shares = []
    for rank in range(2):
        data = attached(tiny_data(prompts=str(path), predict_batch_size=2), tiny_module(), "predict", rank, 2)
        shares.append([item for batch in data.predict_dataloader() for item in batch])
    assert [[number for number, _ in share] for share in shares] == [[0, 2, 4], [1, 3]]
    assert all(request.segments == (str(number),) for share in shares for number, request in share)
