"""Training of the demo checkpoint: its batches come from the code that trains students."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

from latentforge.export.demo import CHECKPOINT, COLORS, NAMES
from latentforge.train.demo.architecture import TOKENS, Denoiser, training_noise
from latentforge.train.demo.train import CaptionedLatents, TrainingRun
from latentforge.train.distill.batch import Comparison, TrainingBatch
from latentforge.train.distill.clean_latents import NoisySource
from latentforge.train.distill.task import task_loss

IMAGES = len(NAMES) * len(COLORS)


@pytest.fixture(scope="module")
def vocabulary() -> CLIPTokenizer:
    """Return the tokenizer of the checkpoint."""
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer")
    return tokenizer


def latents() -> torch.Tensor:
    """Return latents of which each says which image it is."""
    numbers = torch.arange(float(IMAGES)).reshape(len(NAMES), len(COLORS), 1, 1, 1)
    return numbers.expand(-1, -1, 4, 16, 16)


def letters(text: str) -> str:
    """Return the letters of a text, which decoding separates elsewhere."""
    return "".join(filter(str.isalpha, text))


def batch(source: CaptionedLatents, rows: int, seed: int) -> TrainingBatch:
    """Return a batch as the denoiser is trained on."""
    noisy = NoisySource(source, training_noise(), free=0.1, times=source.times)
    return noisy.draw(rows, torch.Generator().manual_seed(seed))


def test_an_epoch_has_every_image_with_a_caption_of_its_own(vocabulary: CLIPTokenizer) -> None:
    source = CaptionedLatents(latents(), vocabulary)
    drawn = source.draw(IMAGES, torch.Generator().manual_seed(0))
    numbers = drawn.latents[:, 0, 0, 0].long().tolist()
    assert sorted(numbers) == [*range(IMAGES)]
    texts = vocabulary.batch_decode(drawn.condition["tokens"][:50], skip_special_tokens=True)
    for number, text in zip(numbers, texts, strict=False):
        assert letters(NAMES[number // len(COLORS)]) in letters(text)
        color = list(COLORS)[number % len(COLORS)]
        assert color in text or color == "white"


def test_half_of_a_batch_is_noisy_at_first_and_a_tenth_at_the_end(
    vocabulary: CLIPTokenizer,
) -> None:
    source = CaptionedLatents(latents(), vocabulary)
    shares = []
    for source.progress in (0.0, 1.0):
        times = batch(source, 320, seed=1).feeds["timestep"]
        assert (times == 999).float().mean() >= 1 / 16
        shares.append((times >= 500).float().mean().item())
    assert shares == pytest.approx([0.75, 0.55], abs=0.03)  # of the rest, half is noisy too


def test_batches_go_on_from_a_position(vocabulary: CLIPTokenizer) -> None:
    first, again = (CaptionedLatents(latents(), vocabulary) for _ in range(2))
    before = [batch(first, 6, seed) for seed in range(3)]
    again.restore({"position": 12})
    rows = batch(again, 6, 2)
    assert all(torch.equal(rows.feeds[name], before[2].feeds[name]) for name in rows.feeds)
    assert rows.feeds["tokens"].shape == (6, TOKENS)


def test_updates_lower_the_loss_and_go_on_from_a_file(
    vocabulary: CLIPTokenizer, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    run = TrainingRun(Denoiser(vocabulary), 5e-3, tmp_path / "denoiser.pt")
    rows = batch(CaptionedLatents(latents() / IMAGES, vocabulary), 4, seed=0)

    def loss() -> torch.Tensor:
        output = run.model(**rows.feeds)
        pair = Comparison(batch=rows, student=output, teacher=output, weight=torch.ones(4))
        return task_loss(pair)

    losses = [run.advance(loss(), 0.2) for _ in range(4)]
    assert losses[-1] < 0.8 * losses[0]
    run.save()
    resumed = TrainingRun(Denoiser(vocabulary), 5e-3, tmp_path / "denoiser.pt")
    assert resumed.step == 4
    pairs = zip(resumed.model.parameters(), run.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
