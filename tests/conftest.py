"""What many tests share: tiny corpora, a tokenizer of bytes, a tiny model, and ways to run them on the CPU."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, VQModel

from tests.reference.ids import BlockIds
from tfusion.data import Shapes
from tfusion.data.corpora import CaptionedImage
from tfusion.data.datamodule import MultimodalDataModule
from tfusion.models.chameleon import Chameleon
from tfusion.models.transfusion import Transfusion
from tfusion.tokenizers import TextTokenizer, VAETokenizer, VQTokenizer
from tfusion.training.chameleon import ChameleonModule
from tfusion.training.transfusion import TransfusionModule

ROOT = Path(__file__).parents[1]
IMAGE_SIZE = 8
BYTES_VOCAB_SIZE = 261  # 5 special ids and 256 bytes: no merges
TINY_AUTOENCODER = {  # of diffusers' AutoencoderKL
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 5,
    "norm_num_groups": 2,
    "mid_block_add_attention": False,
    "scaling_factor": 0.4,
}
NAMES = ("red", "lime", "blue", "yellow", "cyan", "pink", "white", "black", "olive", "teal", "brown")


def pytest_configure(config: pytest.Config) -> None:
    """Workers (`-n`) share the cores, and so do the processes that their tests start."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def picture(number: int) -> CaptionedImage:
    """Two flat colours, different for every number, with a short and a longer caption."""
    draws = torch.Generator().manual_seed(number)
    colors = torch.randint(0, 256, (2, 3, 1, 1), generator=draws, dtype=torch.uint8)
    image = colors[0].expand(3, IMAGE_SIZE, IMAGE_SIZE).clone()
    image[:, :, number % IMAGE_SIZE :] = colors[1]
    name = NAMES[number % len(NAMES)]
    return CaptionedImage(f"picture-{number}", image, (name, f"one {name} tile"))


class TinyPictures:
    """11 pictures to train on, 5 others held out."""

    name, image_size = "tiles", IMAGE_SIZE

    def load(self, split: str) -> Sequence[CaptionedImage]:
        return [picture(n) for n in {"train": range(11), "val": range(11, 16), "test": range(16, 18)}[split]]


class FewScenes:
    """A few of `Shapes` at 64 x 64."""

    name, image_size, scenes = "shapes", 64, True

    def load(self, split: str) -> Sequence[CaptionedImage]:
        pictures = Shapes(self.image_size).load(split)
        return [pictures[i] for i in range(4)]


class TinyTexts:
    """Made-up texts: one line, empty lines within, none at all, no line end, and one of several pieces (> 2 KB)."""

    name = "lines"

    def load(self, split: str) -> Sequence[str]:
        verses = [f"Line {n} of a long text, in which é and 漢 count for several bytes.\n" for n in range(80)]
        if split != "train":
            return [
                "A held-out text with a line that is long enough.\n\nAnd a short one.\n",
                "".join(verses[5:12]),
            ]
        return [
            "A single line.\n",
            "First.\n\n\nAfter two empty lines.\n",
            "",
            "no line end",
            "".join(verses),
        ]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing reads or writes the user's cache."""
    os.environ["TFUSION_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def pictures() -> TinyPictures:
    return TinyPictures()


@pytest.fixture(scope="session")
def texts() -> TinyTexts:
    return TinyTexts()


@pytest.fixture(scope="session")
def byte_tokenizer(cache_folder: None) -> TextTokenizer:
    """One id a byte."""
    return TextTokenizer.train([], BYTES_VOCAB_SIZE)


@pytest.fixture(scope="session")
def tiny_module() -> Callable[..., TransfusionModule]:
    """`tiny_module(family="ddpm", prediction_type="epsilon", **settings)`: fp32, 8 x 8 pixels in 4 patches, T = 64.

    Settings of the same name as the model's go to the model (`dim`, `num_layers`, `max_seq_len`, ...).
    """
    sizes = {"vocab_size": BYTES_VOCAB_SIZE, "latent_shape": (3, IMAGE_SIZE, IMAGE_SIZE), "patch_size": 4}
    sizes |= {"dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}

    def make(family: str = "ddpm", prediction_type: str = "epsilon", **settings: Any) -> TransfusionModule:
        of_model = inspect.signature(Transfusion).parameters
        model = Transfusion(**(sizes | {name: settings.pop(name) for name in of_model if name in settings}))
        if family == "ddpm":
            scheduler = DDPMScheduler(
                beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, clip_sample=False
            )
        else:
            scheduler = FlowMatchEulerDiscreteScheduler()
        settings = {"lr": 1e-2, "warmup_steps": 2} | settings
        return TransfusionModule(model, scheduler, prediction_type=prediction_type, **settings)

    return make


@pytest.fixture(scope="session")
def tiny_chameleon() -> Callable[..., ChameleonModule]:
    """`tiny_chameleon(**settings)`: fp32, 8 x 8 pixels as 4 of 27 ids, T = 64; settings as `tiny_module`."""
    sizes = {"vocab_size": BYTES_VOCAB_SIZE, "codebook_size": 27, "latent_shape": (1, 2, 2)}
    sizes |= {"dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}

    def make(**settings: Any) -> ChameleonModule:
        of_model = inspect.signature(Chameleon).parameters
        model = Chameleon(**(sizes | {name: settings.pop(name) for name in of_model if name in settings}))
        return ChameleonModule(model, **({"image_tokenizer": BlockIds(4, 3), "lr": 1e-2, "warmup_steps": 2} | settings))

    return make


@pytest.fixture(scope="session")
def tiny_data(pictures: TinyPictures, texts: TinyTexts) -> Callable[..., MultimodalDataModule]:
    """`tiny_data(**settings)`: both corpora, 4 rows of 64 a step, 2 lanes."""

    def make(**settings: Any) -> MultimodalDataModule:
        defaults = {"image_corpora": [pictures], "text_corpora": [texts], "vocab_size": BYTES_VOCAB_SIZE}
        return MultimodalDataModule(**(defaults | {"seq_len": 64, "rows_per_step": 4, "lanes": 2} | settings))

    return make


@pytest.fixture
def tiny_trainer(tmp_path) -> Callable[..., L.Trainer]:
    """`tiny_trainer(max_steps, **settings)`: a Trainer on the CPU that shows, logs, validates and saves nothing."""

    def make(max_steps: int, **settings: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
        endless = {"max_steps": max_steps, "max_epochs": -1, "check_val_every_n_epoch": None}
        here = {"accelerator": "cpu", "devices": 1, "default_root_dir": tmp_path, "gradient_clip_val": 1.0}
        return L.Trainer(use_distributed_sampler=False, **(quiet | endless | here | settings))

    return make


@pytest.fixture(scope="session")
def attached() -> Callable[..., MultimodalDataModule]:
    """`attached(data, module, stage="fit", rank=0, ranks=1, accumulate=1)`: set up as by a Trainer, without one."""

    def attach(
        data: MultimodalDataModule,
        module: TransfusionModule,
        stage: str | None = "fit",
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
    ) -> MultimodalDataModule:
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            lightning_module=module,
            global_rank=rank,
            world_size=ranks,
            accumulate_grad_batches=accumulate,
            max_steps=-1,  # a Trainer's own default: no limit
            training=True,
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
        )
        if stage is not None:
            data.setup(stage)
        return data

    return attach


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `configs/` and, under `runs/`, tiny autoencoders and caches where configs expect them."""
    from tests.data.latent_caches import encode  # which imports this file

    folder = tmp_path_factory.mktemp("configs")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, halvings, codes in (
        ("autoencoder", 2, None),
        ("vq_autoencoder", 2, 512),
        ("autoencoder_paper", 3, None),
        ("vq_autoencoder_paper", 3, 16384),
    ):
        stages = halvings + 1
        sizes = {"block_out_channels": (4,) * stages, "norm_num_groups": 2, "latent_channels": 8}
        sizes |= {
            "down_block_types": ("DownEncoderBlock2D",) * stages,
            "up_block_types": ("UpDecoderBlock2D",) * stages,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind = AutoencoderKL if codes is None else VQModel
            more = {"mid_block_add_attention": False} | (
                {"num_vq_embeddings": codes, "vq_embed_dim": 4} if codes else {}
            )
            kind(**sizes, **more).save_pretrained(folder / "runs" / name / "autoencoder")
    small = {"encode": VAETokenizer, "encode_ids": VQTokenizer}
    for (run, tokenizer), name in zip(small.items(), ("autoencoder", "vq_autoencoder"), strict=True):
        autoencoder = tokenizer(str(folder / "runs" / name / "autoencoder"))
        encode(folder / "runs" / run, autoencoder, [FewScenes()])
    return folder
