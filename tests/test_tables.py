"""Every row of the paper's Tables 3 to 8 is a command; its lines in the table build the model that its words say."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from tfusion.__main__ import TfusionCLI, run
from tfusion.models.autoencoder import KLAutoencoder, VQAutoencoder
from tfusion.models.chameleon import Chameleon

ROOT = Path(__file__).parents[1]
TABLES = (ROOT / "configs" / "ablation" / "README.md").read_text(encoding="utf-8")
ROWS_OF_THE_PAPER = {3: 2, 4: 4, 5: 4, 6: 7, 7: 10, 8: 4}
WIDTHS = {"0.16B": 768, "0.37B": 1024, "0.76B": 1536, "1.4B": 2048, "7B": 4096}
SMALL_WIDTHS = dict(zip(WIDTHS, (128, 192, 192, 256, 384), strict=True))


@dataclass(frozen=True)
class Row:
    table: int
    title: str
    label: str
    paper: str
    small: str


def read_rows() -> list[Row]:
    rows = []
    for part in TABLES.split("\n## Table ")[1:]:
        title, _, body = part.partition("\n")
        for label, paper, small in re.findall(
            r"^(.+):\n\n    (tfusion fit .+)\n    (tfusion fit .+)$", body, re.MULTILINE
        ):
            rows.append(Row(int(title[0]), title, label, paper, small))
    return rows


ROWS = read_rows()
CASES = [(row, scale) for row in ROWS for scale in ("paper", "small")]


class Built(TfusionCLI):
    """The command line of `tfusion fit`, with all its refusals, up to its model, data and callbacks."""

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate(self.config)
        self.model, self.datamodule = self._get(self.config_init, "model"), self._get(self.config_init, "data")

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


@pytest.fixture(scope="module")
def cli(config_folder: Path) -> Built:
    """With one parser for all rows, for to make it takes longer than to use it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config_folder)
        return run(Built, shlex.split(ROWS[0].paper)[1:])


def build(cli: Built, command: str) -> Built:
    program, *arguments = shlex.split(command)
    assert program == "tfusion"
    cli.config = cli.parser.parse_args(arguments)
    cli.before_instantiate_classes()
    cli.instantiate_classes()
    return cli


def test_all_rows_are_there_and_none_runs_into_another() -> None:
    for table, number in ROWS_OF_THE_PAPER.items():
        assert sum(row.table == table and not row.label.startswith("not in the paper") for row in ROWS) == number
    commands = [command for row in ROWS for command in (row.paper, row.small)]
    assert TABLES.count("    tfusion fit") == len(commands) + 2  # the autoencoders'
    folders = [re.search(r"default_root_dir (\S+)", command).group(1) for command in commands]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(("row", "scale"), CASES, ids=[f"{row.table}-{row.label}-{scale}" for row, scale in CASES])
def test_a_row_builds_what_it_says(
    row: Row, scale: str, cli: Built, config_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config_folder)
    built = build(cli, getattr(row, scale))
    module, model, data = built.model, built.model.model, built.datamodule
    assert all(parameter.is_meta for parameter in model.parameters())
    assert module.model_vocab_size == data.vocab_size
    assert model.max_seq_len == data.seq_len
    size = re.search(r"\d\.?\d*B", row.label) or re.search(r"\d\.?\d*B", row.title)
    assert model.embedding.embedding_dim == (WIDTHS if scale == "paper" else SMALL_WIDTHS)[size.group()]
    assert isinstance(model, Chameleon) == ("Chameleon" in row.label or row.label.endswith("the stability parts"))
    if isinstance(model, Chameleon):
        stable = "without the stability parts" not in row.label
        assert (model.norm_order, module.z_loss_weight > 0) == (("post", True) if stable else ("pre", False))
        assert any("q_norm" in name for name, _ in model.named_parameters()) == stable
        assert module.predicts_images == bool(data.image_corpora) == ("+ stability modifications" not in row.label)
        return
    assert bool(data.image_corpora) == (row.label != "Llama 2") == module.predicts_images
    if not data.image_corpora:
        return
    assert model.adapter == ("unet" if "U-Net" in row.label or row.table == 8 else "linear")
    assert model.image_attention == ("causal" if ", causal" in row.label else "bidirectional")
    limit = 0.5 if "limit: yes" in row.label else 0.0 if "clean" in row.label else 1.0
    assert data.image_first_noise_limit == limit
    if patches := re.search(r"(\d+) patches", row.label):
        assert model.num_patches == (int(patches.group(1)) if scale == "paper" else min(int(patches.group(1)), 256))
    elif scale == "paper":
        assert (model.patch_size, model.num_patches) == (2, 256)
    if scale == "paper" and (guidance := re.search(r"guidance (\d)", row.title)):
        assert module.generation.guidance_scale == float(guidance.group(1))
        assert (module.generation.sampler, module.generation.num_inference_steps) == (None, 250)
        assert module.process.family == "ddpm"


def test_the_papers_codes_are_an_overlay_of_its_autoencoder(
    cli: Built, config_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which changes the class: what is said of the other one, and of its loss, has to stay where it fits."""
    monkeypatch.chdir(config_folder)
    command = "tfusion fit --config configs/autoencoder_paper.yaml"
    of_latents = build(cli, command).model
    of_codes = build(cli, f"{command} --config configs/autoencoder/vq.yaml").model
    assert (type(of_latents.model), type(of_codes.model)) == (KLAutoencoder, VQAutoencoder)
    assert (of_codes.model.codebook_size, of_codes.model.restart_after) == (16384, 100)
    assert of_codes.model.network.quantize.beta == 0.25
    assert of_codes.model.image_size == of_latents.model.image_size == 256
    assert of_codes.model.coded_shape == of_latents.model.coded_shape == (8, 32, 32)
    numel = [sum(p.numel() for p in one.model.parameters()) for one in (of_latents, of_codes)]
    assert numel[1] == pytest.approx(numel[0], rel=0.01)
    kept = ("perceptual", "adversarial", "discriminator", "l1")
    assert {name: of_codes.weights[name] for name in kept} == {name: of_latents.weights[name] for name in kept}
