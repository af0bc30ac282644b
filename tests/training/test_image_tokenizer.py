"""Weights mean the latents of one autoencoder: a checkpoint says of which, and another is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import BYTES_VOCAB_SIZE
from tests.data.latent_caches import LATENT_SHAPE, one_by_one, save_autoencoder
from tests.reference.ids import BlockIds
from tests.test_cli import CONFIG, tfusion
from tfusion import load
from tfusion.tokenizers import TextTokenizer, VAETokenizer
from tfusion.training.transfusion import TransfusionModule
from tfusion.training.warm_start import InitFrom

ADAPTERS = ("patch_encoder", "patch_decoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two autoencoders of one kind and size."""
    root = tmp_path_factory.mktemp("autoencoders")
    return save_autoencoder(root / "one"), save_autoencoder(root / "other", seed=1)


def latent(tiny_module, folder: str, **settings: Any) -> TransfusionModule:
    sizes = {"latent_shape": LATENT_SHAPE, "patch_size": 2}
    return tiny_module(image_tokenizer=one_by_one(folder), **(sizes | settings))


def saved(module: Any, path: Path, **changes: Any) -> dict[str, Any]:
    """A checkpoint of a fresh module, less what `changes` says is None."""
    module.materialize("cpu")
    module.text_tokenizer = TextTokenizer.train([], BYTES_VOCAB_SIZE)
    state: dict[str, Any] = {"state_dict": module.state_dict(), "optimizer_states": []}
    module.on_save_checkpoint(state)
    state = {name: value for name, value in (state | changes).items() if value is not None}
    torch.save(state, path)
    return state


def message(folders: tuple[str, str]) -> str:
    one, other = (VAETokenizer(folder).fingerprint for folder in folders)
    return rf"trained with the image tokenizer '{one}', the configured one is '{other}' \(of '.*/other'\)"


def test_a_resume_and_validation_refuse_another(tiny_module, tiny_data, tiny_trainer, tmp_path, folders) -> None:
    one, other = folders
    trainer = tiny_trainer(1)
    trainer.fit(latent(tiny_module, one), tiny_data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["image_tokenizer"] == VAETokenizer(one).fingerprint
    for stage in ("fit", "validate"):
        run = getattr(tiny_trainer(2, limit_val_batches=1), stage)
        with pytest.raises(ValueError, match=message(folders)):
            run(latent(tiny_module, other), datamodule=tiny_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    tiny_trainer(2).fit(
        latent(tiny_module, one), tiny_data(), ckpt_path=tmp_path / "one.ckpt", weights_only=True
    )  # the same one


def test_older_checkpoints_and_models_without_images_do_not_say(tiny_module, tiny_chameleon, tmp_path, folders) -> None:
    older = saved(latent(tiny_module, folders[0]), tmp_path / "older.ckpt", image_tokenizer=None)
    assert "image_tokenizer" not in older
    latent(tiny_module, folders[1]).on_load_checkpoint(older)
    assert saved(tiny_module(), tmp_path / "pixels.ckpt")["image_tokenizer"] == "pixels"
    text = tiny_module(latent_shape=None, patch_size=None)
    assert "image_tokenizer" not in saved(text, tmp_path / "text.ckpt")  # None: it has none
    ids = saved(tiny_chameleon(image_tokenizer=None), tmp_path / "ids.ckpt")
    tiny_chameleon().on_load_checkpoint(ids)


class Renamed(BlockIds):
    """Other ids of the same number."""

    fingerprint = "renamed"


def test_a_warm_start_refuses_another_where_weights_mean_latents(
    tiny_module, tiny_chameleon, tmp_path, folders
) -> None:
    one, other = folders
    saved(latent(tiny_module, one), tmp_path / "one.ckpt")
    module = latent(tiny_module, other, init_from=InitFrom(str(tmp_path / "one.ckpt")))
    with pytest.raises(ValueError, match=f"init_from: .*one.ckpt was {message(folders)}"):
        module.check_init_from()
    latent(tiny_module, one, init_from=InitFrom(str(tmp_path / "one.ckpt"))).check_init_from()
    init_from = InitFrom(str(tmp_path / "one.ckpt"), unused=ADAPTERS)
    tiny_module(latent_shape=None, patch_size=None, init_from=init_from).check_init_from()  # none of what means latents
    saved(tiny_chameleon(), tmp_path / "ids.ckpt")
    for tokenizer, refused in ((Renamed(4, 3), True), (BlockIds(4, 3), False)):
        module = tiny_chameleon(image_tokenizer=tokenizer, init_from=InitFrom(str(tmp_path / "ids.ckpt")))
        if refused:
            with pytest.raises(ValueError, match="image tokenizer 'blocks-4-3', the configured one is 'renamed';"):
                module.check_init_from()
        else:
            module.check_init_from()


def test_commands_and_load_refuse_an_autoencoder_put_in_the_place_of_the_runs(tmp_path: Path, folders) -> None:
    """The same path, retrained meanwhile; commands say it before they read anything."""
    one, other = folders
    (tmp_path / "autoencoder").symlink_to(one)
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
    settings = config["model"]["init_args"]
    settings["model"]["init_args"] |= {"latent_shape": list(LATENT_SHAPE), "patch_size": 2}
    path = str(tmp_path / "autoencoder")
    settings["image_tokenizer"] = {"class_path": "tfusion.tokenizers.VAETokenizer", "init_args": {"path": path}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code, output = tfusion(tmp_path, "fit", "--config", "config.yaml")
    assert code == 0, output
    load(tmp_path / "run", device="cpu")
    (tmp_path / "autoencoder").unlink()
    (tmp_path / "autoencoder").symlink_to(other)
    expected = message(folders).removesuffix(r" \(of '.*/other'\)")
    with pytest.raises(ValueError, match=expected):
        load(tmp_path / "run", device="cpu")
    (tmp_path / "prompts.jsonl").write_text('{"segments": ["grey"], "generate": "image"}\n')
    for command in (("fit",), ("validate",), ("predict", "--data.prompts", "prompts.jsonl")):
        code, output = tfusion(tmp_path, *command, "--config", "run/config.yaml", "--ckpt_path", "last")
        assert code == 2 and expected in output, output
