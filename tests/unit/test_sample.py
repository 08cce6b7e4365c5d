"""Drawing and judging pictures: pure functions, each against its definition or somebody else's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from training.config.validation import LIBRARY, Prompt, Size, ValidationSettings, read_library, unique_names
from training.errors import SettingError
from training.model.config import TransformerConfig
from training.model.transformer import Lumina2Transformer
from training.objective.sigmas import sampling_sigmas
from training.sample.clip import CLIP, summary
from training.sample.distances import coarse, distances, nearest, spread
from training.sample.draw import draw_latents, picture_noise, picture_seed
from training.sample.euler import guided_velocity, sample_euler, text_velocity
from training.sample.guidance import guide, guided_steps
from training.sample.heldout import fixed_draws, judge, picture_losses
from training.sample.pictures import read_recipe, save_picture

CONFIG = TransformerConfig(
    dim=48, layers=2, refiner_layers=1, heads=4, kv_heads=2, caption_dim=8, ffn_dim=64, channels=4, axes_dim=(4, 4, 4)
)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    made = Lumina2Transformer(CONFIG).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_(1 if weight.ndim == 1 else 0, 0.2)
    return made


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 8, generator=generator), torch.randn(2, 8, generator=generator)


def settings(**changed):
    return ValidationSettings(**{"validation_num_inference_steps": 6, "validation_resolution": "32x48", **changed})


# --- guidance


def predictions():
    return torch.randn(2, 2, 4, 6, 8, generator=torch.Generator().manual_seed(2)).unbind()


def test_guidance_rescale_is_what_diffusers_does_elsewhere():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    wanted, unwanted = predictions()
    plain = guide(wanted, unwanted, 4.0)
    assert torch.allclose(plain, unwanted + 4 * (wanted - unwanted))
    for share in (0.3, 1.0):
        expected = rescale_noise_cfg(plain, wanted, share)
        assert torch.allclose(guide(wanted, unwanted, 4.0, rescale=share), expected, atol=1e-5)
    assert not torch.allclose(guide(wanted, unwanted, 4.0, rescale=1.0), plain, rtol=0.1)


def test_renormalised_guidance_keeps_each_rows_length():
    wanted, unwanted = predictions()
    kept = guide(wanted, unwanted, 4.0, normalise=True)
    assert torch.allclose(kept.norm(dim=-1), wanted.norm(dim=-1), rtol=1e-5)
    assert torch.allclose(guide(3 * wanted, 3 * unwanted, 4.0, True, 0.5), 3 * guide(wanted, unwanted, 4.0, True, 0.5))


def test_truncation_counts_steps_as_diffusers_does():
    for steps in (1, 4, 7, 30):
        for ratio in (0.0, 0.25, 0.5, 0.99, 1.0):
            acts = [(step + 1) / steps <= ratio for step in range(steps)]
            assert guided_steps(steps, ratio) == sum(acts)
            assert acts == sorted(acts, reverse=True)  # the first ones, so that a sampling can be cut in two


# --- drawing


def test_a_drawing_is_a_guided_euler(transformer, texts):
    noise = picture_noise(3, 4, Size(32, 48))
    with torch.no_grad():
        velocity = guided_velocity(transformer, *texts, 4.0)
        expected = sample_euler(velocity, noise, sampling_sigmas(6, 6.0))
        assert torch.equal(draw_latents(transformer, *texts, noise, settings()), expected)
        other_shift = draw_latents(transformer, *texts, noise, settings(), shift=2.0)
        assert torch.equal(other_shift, sample_euler(velocity, noise, sampling_sigmas(6, 2.0)))
        assert torch.equal(draw_latents(transformer, *texts, noise, settings(validation_shift=2.0)), other_shift)
    assert expected.shape == (1, 4, 6, 4)


def test_every_option_of_guidance_changes_the_picture(transformer, texts):
    noise = picture_noise(3, 4, Size(32, 48))

    def draw(**changed):
        with torch.no_grad():
            return draw_latents(transformer, *texts, noise, settings(**changed))

    drawn = [
        draw(),
        draw(validation_guidance=2.0),
        draw(validation_guidance_rescale=0.7),
        draw(cfg_normalization=True),
        draw(cfg_trunc_ratio=0.5),
        draw(validation_guidance=1.0),
    ]
    scale = drawn[0].std()
    for number, one in enumerate(drawn):
        assert all((one - other).abs().max() > 1e-3 * scale for other in drawn[:number])
    assert torch.equal(draw(cfg_trunc_ratio=0.0), drawn[-1])  # never guided


def test_a_truncated_drawing_asks_the_negative_side_in_the_guided_steps_only(transformer, texts):
    asked, ticks = [], []
    predict = transformer.predict
    transformer.predict = lambda *args: asked.append(args[3][0]) or predict(*args)
    try:
        with torch.no_grad():
            noise = picture_noise(3, 4, Size(32, 48))
            draw_latents(transformer, *texts, noise, settings(cfg_trunc_ratio=0.5), on_step=ticks.append)
    finally:
        del transformer.predict
    assert asked.count(2) == 3  # the negative's two tokens
    assert asked.count(5) == 6
    assert ticks == list(range(6))


def test_noise_and_seeds_depend_on_nothing_else():
    state = torch.get_rng_state()
    noise = picture_noise(7, 16, Size(64, 96))
    assert torch.equal(noise, torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.get_rng_state(), state)
    assert [picture_seed(42, number) for number in range(3)] == [42, 43, 44]
    assert picture_seed(2**64 - 1, 1) == 0
    picture_noise(picture_seed(2**64 - 1, 0), 4, Size(16, 16))


# --- files


def test_a_picture_says_what_it_shows(tmp_path):
    recipe = {
        **{"prompt": "一只猫 in the rain", "negative_prompt": "blurry", "seed": 2**64 - 1, "width": 8, "height": 4},
        **{"steps": 6, "guidance": 4.0, "shift": 6.0},
    }
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), dtype=np.uint8)
    path = tmp_path / "samples" / "step-5" / "cat-0.png"
    save_picture(path, pixels, recipe)
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert read_recipe(path) == recipe
    words = Image.open(path).text["parameters"]
    assert words.startswith("一只猫 in the rain\nNegative prompt: blurry\nSteps: 6,")
    assert "Seed: 18446744073709551615" in words
    assert [each.name for each in path.parent.iterdir()] == ["cat-0.png"]
    assert read_recipe(tmp_path / "none.png") == {}
    path.write_bytes(path.read_bytes()[:30])
    assert read_recipe(path) == {}


# --- distances


def test_distances_are_root_mean_squares_of_coarse_latents():
    a, b = torch.zeros(1, 4, 16, 16), torch.full((1, 4, 32, 8), 3.0)
    assert coarse(a).shape == coarse(b).shape == (1, 256)
    assert distances(coarse(a), coarse(b)).item() == pytest.approx(3.0)
    fine = torch.zeros(1, 4, 16, 16)
    fine[..., ::2, :], fine[..., 1::2, :] = 1.0, -1.0
    assert distances(coarse(a), coarse(fine)).item() == 0  # detail does not count
    known = torch.cat([coarse(a), coarse(b)])
    assert nearest(torch.cat([coarse(a + 1), coarse(a + 2.5)]), known) == pytest.approx((1 + 0.5) / 2)
    assert spread(torch.cat([coarse(a), coarse(b), coarse(a)])) == pytest.approx(2.0)


# --- the held-out loss


def test_held_out_draws_are_stratified_and_a_function_of_the_key():
    places = []
    for number in range(200):
        key = f"{number * 7919:040x}"[::-1]
        sigmas, noise = fixed_draws(key, (4, 2, 2), 8)
        assert [int(sigma * 8) for sigma in sigmas.tolist()] == list(range(8))
        assert torch.equal(noise, fixed_draws(key, (4, 2, 2), 8)[1])
        places.append(sigmas[0].item() * 8)
    assert 0.4 < np.mean(places) < 0.6
    assert np.std(places) > 0.2
    assert not torch.equal(noise[0], noise[1])


def test_held_out_loss_is_the_velocitys_squared_error(transformer, texts):
    latent = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(5))
    key, ticks = "ab" * 20, []
    with torch.no_grad():
        found = picture_losses(transformer, latent, texts[0], key, 3, lambda: ticks.append(1))
        sigmas, noise = fixed_draws(key, (4, 4, 6), 3)
        predict = text_velocity(transformer, texts[0])
        for sigma, each, loss in zip(sigmas, noise, found, strict=True):
            noisy = (1 - sigma) * latent + sigma * each
            error = predict(noisy[None], 1 - sigma[None])[0] - (latent - each)
            assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert len(ticks) == 3


def test_the_lowest_loss_is_best_and_patience_counts_evaluations_without_one():
    losses, seen = [3.0, 2.0, 2.0, 2.5, 1.9, 1.95, 1.9, 4.0], []
    for number, loss in enumerate(losses):
        seen.append(judge(losses[:number], loss, 3))
    assert [best for best, _ in seen] == [True, True, False, False, True, False, False, False]
    assert [stop for _, stop in seen] == [False] * 7 + [True]
    assert judge([1.0, 2.0, 3.0], 4.0, 0) == (False, False)
    assert judge([float("inf")], 2.0, 1) == (True, False)


# --- CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of a few random weights, whose words are letters."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(ord("a") + n) for n in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{each}</w>" for each in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, **text, **ends},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    cut = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(cut, CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))).save_pretrained(folder)
    return folder


PROMPTS = ["a red apple", "heart", "a cat", "so many words that no clip of this size reads them to their end"]


def painted():
    drawn = np.random.default_rng(1).integers(0, 256, (4, 48, 40, 3), dtype=np.uint8)
    drawn[1] //= 8
    return list(drawn)


def test_clip_cosines_are_those_of_torchmetrics(clip_folder):
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPModel, CLIPProcessor

    class Features:
        """torchmetrics wants what transformers 4 gave."""

        def __init__(self):
            self.model = CLIPModel.from_pretrained(clip_folder)
            self.config = self.model.config

        def to(self, device):
            return self

        def get_image_features(self, pixels):
            return self.model(pixel_values=pixels, input_ids=torch.tensor([[0, 1]])).image_embeds

        def get_text_features(self, ids, mask):
            empty = torch.zeros(1, 3, 32, 32)
            return self.model(pixel_values=empty, input_ids=ids, attention_mask=mask).text_embeds

    pictures, found = painted(), CLIP(str(clip_folder)).cosines(painted(), PROMPTS)
    shorter = PROMPTS[:3]  # torchmetrics cuts long ones before their end token
    parts = Features(), CLIPProcessor.from_pretrained(clip_folder)
    for picture, prompt, cosine in zip(pictures, shorter, found, strict=False):
        image = torch.from_numpy(picture).movedim(-1, 0)
        theirs = clip_score(image, prompt, model_name_or_path=lambda: parts)
        assert theirs.item() == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert max(found) > 0
    assert len({round(cosine, 4) for cosine in found}) == 4


def test_clip_scores_are_named_by_their_unit_and_count_all_pictures(clip_folder):
    found = CLIP(str(clip_folder)).cosines(painted(), PROMPTS)
    told = summary(found)
    assert told["clip_cosine"] == pytest.approx(np.mean(found))
    assert told["clip_score"] == pytest.approx(100 * np.mean(found))
    assert told["clip_score_min"] == pytest.approx(100 * min(found))
    assert told["clip_score_max"] == pytest.approx(100 * max(found))
    assert told["clip_score_std"] == pytest.approx(100 * np.std(found))


def test_a_clip_that_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(SettingError, match=r"There is no CLIP at .*set evaluation_type to none"):
            CLIP(source)


# --- settings


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"validation_guidance": 0.5}, "validation_guidance is 0.5"),
        ({"validation_guidance_rescale": 1.5}, "choose 0 to 1"),
        ({"cfg_trunc_ratio": -0.1}, "cfg_trunc_ratio"),
        ({"validation_num_inference_steps": 0}, "validation_num_inference_steps"),
        ({"validation_shift": -1.0}, "validation_shift"),
        ({"validation_seed": 2**64}, "validation_seed"),
        ({"validation_step_interval": -1}, "validation_step_interval"),
        ({"evaluation_type": "fid"}, "choose one of none, clip"),
        ({"ema_validation": "both"}, "comparison, ema_only, none"),
        ({"evaluation_type": "clip", "pretrained_evaluation_model_name_or_path": ""}, "name a folder with a CLIP"),
        ({"keep_best": True}, "set eval_steps_interval"),
        ({"early_stopping_patience": 3}, "set eval_steps_interval"),
        ({"validation_resolution": "big"}, "1024x1024"),
        ({"validation_resolution": ""}, "write a size"),
        ({"validation_resolution": "64x9000"}, "8192"),
        ({"validation_resolution": "4"}, "16"),
    ],
)
def test_impossible_settings_name_themselves(changed, sentence):
    with pytest.raises(SettingError, match=sentence):
        ValidationSettings(**changed)


def test_sizes_are_read_as_simpletuner_writes_them():
    assert ValidationSettings().sizes == (Size(1024, 1024),)
    assert ValidationSettings(validation_resolution="256").sizes == (Size(256, 256),)
    sizes = ValidationSettings(validation_resolution="832x1216, 1000X1003, 1008×1008").sizes
    assert sizes == (Size(832, 1216), Size(992, 1008), Size(1008, 1008))


def test_prompts_come_in_simpletuners_order_under_names_that_can_be_files(tmp_path):
    library = tmp_path / "mine.json"
    library.write_text('{"a/cat": "a cat", "A cat": {"prompt": "another"}, "validation": "third"}', encoding="utf-8")
    chosen = ValidationSettings(
        validation_prompt="one\n\n two ",
        user_prompt_library=str(library),
        validation_disable_unconditional=False,
    )
    assert chosen.prompts() == (
        Prompt("unconditional", ""),
        Prompt("a-cat", "a cat"),
        Prompt("A-cat-2", "another"),
        Prompt("validation", "third"),
        Prompt("validation-2", "one"),
        Prompt("validation-3", "two"),
    )
    assert unique_names([("???", "x"), ("猫", "y")]) == [Prompt("picture", "x"), Prompt("猫", "y")]


def test_our_library_has_forty_prompts_of_its_own():
    named = read_library(LIBRARY)
    prompts = ValidationSettings(validation_prompt_library=True).prompts()
    assert [tuple(each) for each in prompts] == named  # names are files' already
    assert len({text for _, text in named}) == 40
    assert all(20 <= len(text) <= 300 for _, text in named)


@pytest.mark.parametrize("content", ["[]", "{}", "not json", '{"a": 3}', '{"a": " "}', '{"a": {"text": "x"}}'])
def test_a_library_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(SettingError, match=r"mine\.json"):
        ValidationSettings(user_prompt_library=str(path)).prompts()
    with pytest.raises(SettingError, match=r"gone\.json"):
        ValidationSettings(user_prompt_library=str(tmp_path / "gone.json")).prompts()
