"""The two CLIP towers against StableDiffusionXLPipeline.encode_prompt, on the tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shared.conditioning import TEXT_LENGTH
from shared.errors import DataError
from shared.text_encoders import TextEncoders, read_text_facts, tokenizer_digest

CAPTIONS = [
    "",
    " ",
    "a red circle",
    "A RED Circle",
    "a small blue star above a large green square on a white background",
    "red!",
    "!",
    "! ! !",
    "wow!!! a circle !important",
    "a red circle. " * 40,
    "x" * 1000,
    "orange " * 75,
    "orange " * 76,
    "ünïcödé ÇÀÑ ß ẞ ﬁ",
    "日本語の文章 中文 한국어",
    "🦊🏳️‍🌈 👩‍👩‍👧 emoji",
    "<|endoftext|>",
    "<|startoftext|> a red <|endoftext|> circle",
    "<|endoftext|><|endoftext|> twice",
    "tabs\tand\nnew\r\nlines\u2028there",
    "nul\x00 and bell\x07",
    "   spaces   between   ",
    "it's o'clock, isn't it? I'll we've 1234567890",
    "&amp; <b>html</b> &#39;",
    "a̐éö̲ combining e\u0301",
]


@pytest.fixture(scope="module")
def encoders(tiny_model: Path) -> TextEncoders:
    return TextEncoders(tiny_model, "cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(tiny_model)


def pipeline_embeds(pipeline: StableDiffusionXLPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        embeds, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    return embeds, pooled


@pytest.mark.parametrize("index", range(len(CAPTIONS)))
def test_one_caption_is_the_pipelines_bit_for_bit(
    encoders: TextEncoders, pipeline: StableDiffusionXLPipeline, index: int
) -> None:
    embeds, pooled = pipeline_embeds(pipeline, [CAPTIONS[index]])
    ours = encoders.encode([CAPTIONS[index]])
    assert torch.equal(ours.prompt_embeds, embeds)
    assert torch.equal(ours.pooled_prompt_embeds, pooled)


def test_a_batch_is_the_pipelines_bit_for_bit(encoders: TextEncoders, pipeline: StableDiffusionXLPipeline) -> None:
    assert len(CAPTIONS) == 25
    embeds, pooled = pipeline_embeds(pipeline, CAPTIONS)
    ours = encoders.encode(CAPTIONS)
    assert ours.prompt_embeds.shape == (25, 77, 96)
    assert ours.pooled_prompt_embeds.shape == (25, 48)
    assert torch.equal(ours.prompt_embeds, embeds)
    assert torch.equal(ours.pooled_prompt_embeds, pooled)
    assert ours.prompt_embeds.dtype == ours.pooled_prompt_embeds.dtype == torch.float32


def test_captions_differ_and_pooling_sees_it(encoders: TextEncoders) -> None:
    """A wrong end-of-text id pools every prompt at the same place."""
    pooled = encoders.encode(["a red circle", "a blue circle", ""]).pooled_prompt_embeds
    assert not torch.equal(pooled[0], pooled[1])
    assert not torch.equal(pooled[0], pooled[2])


@pytest.mark.parametrize("chunks", [2, 3])
def test_chunks_are_framed_stretches_one_after_another(tiny_model: Path, encoders: TextEncoders, chunks: int) -> None:
    long = TextEncoders(tiny_model, "cpu", chunks)
    words = [f"{colour} " for colour in ("red", "green", "blue")]
    caption = "".join(word * 75 for word in words)
    ours = long.encode([caption, "a red circle"])
    assert ours.prompt_embeds.shape == (2, chunks * TEXT_LENGTH, 96)
    pieces = encoders.encode([*(word * 75 for word in words[:chunks]), "a red circle", ""])
    for index in range(chunks):
        rows = slice(index * TEXT_LENGTH, (index + 1) * TEXT_LENGTH)
        torch.testing.assert_close(ours.prompt_embeds[0, rows], pieces.prompt_embeds[index], rtol=1e-5, atol=1e-5)
        short = pieces.prompt_embeds[chunks if index == 0 else chunks + 1]
        torch.testing.assert_close(ours.prompt_embeds[1, rows], short, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.pooled_prompt_embeds, pieces.pooled_prompt_embeds[[0, chunks]], rtol=1e-5, atol=1e-5
    )


def test_truncation_is_counted(tiny_model: Path, encoders: TextEncoders) -> None:
    counts = {words: encoders.count("orange " * words) for words in (0, 1, 75, 76, 150)}
    assert {words: count.tokens for words, count in counts.items()} == {words: words for words in counts}
    assert [count.truncated for count in counts.values()] == [False, False, False, True, True]
    long = TextEncoders(tiny_model, "cpu", 2)
    assert [long.count("orange " * words).truncated for words in (75, 76, 150, 151)] == [False, False, False, True]


# --- facts ---


def test_facts_are_the_models(tiny_model: Path) -> None:
    facts = read_text_facts(tiny_model)
    assert (facts.widths, facts.pooled_width) == ((32, 64), 48)
    assert facts.digests.keys() == {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert len(set(facts.digests.values())) == 4
    assert all(len(digest) == 64 for digest in facts.digests.values())


def test_digests_survive_transformers_saving_the_folders_again(tiny_model: Path, tmp_path: Path) -> None:
    """transformers 5 writes tokenizer.json alone."""
    CLIPTextModel.from_pretrained(tiny_model / "text_encoder").save_pretrained(tmp_path / "text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(tiny_model / "text_encoder_2")
    second.save_pretrained(tmp_path / "text_encoder_2", max_shard_size="40KB")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(tiny_model / name)
        tokenizer(["a", "a red circle"], padding="max_length")  # leaves its padding in tokenizer.json
        tokenizer.save_pretrained(tmp_path / name)
    assert len(list((tmp_path / "text_encoder_2").glob("*.safetensors"))) > 1
    assert not (tmp_path / "tokenizer" / "vocab.json").exists()
    assert read_text_facts(tmp_path) == read_text_facts(tiny_model)


def test_names_of_tensors_may_come_without_their_prefix(
    tiny_model: Path, encoders: TextEncoders, tmp_path: Path
) -> None:
    """As transformers 5 writes a model that it has made itself."""
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    for name in ("text_encoder", "text_encoder_2"):
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        assert sum(key.startswith("text_model.") for key in tensors) > 10
        stripped = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
        save_file(stripped, file, metadata={"format": "pt"})
    assert read_text_facts(tmp_path) == read_text_facts(tiny_model)
    again = TextEncoders(tmp_path, "cpu").encode(CAPTIONS[:5])
    assert torch.equal(again.prompt_embeds, encoders.encode(CAPTIONS[:5]).prompt_embeds)


def test_digests_and_embeds_survive_diffusers_saving_the_pipeline_again(
    pipeline: StableDiffusionXLPipeline, encoders: TextEncoders, tiny_model: Path, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    assert read_text_facts(tmp_path) == read_text_facts(tiny_model)
    again = TextEncoders(tmp_path, "cpu").encode(CAPTIONS[:5])
    assert torch.equal(again.prompt_embeds, encoders.encode(CAPTIONS[:5]).prompt_embeds)


def copied_tokenizer(tiny_model: Path, folder: Path, name: str = "tokenizer") -> Path:
    return Path(shutil.copytree(tiny_model / name, folder / "tokenizer", dirs_exist_ok=True))


def test_a_changed_merge_word_or_special_token_changes_the_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    digests = [tokenizer_digest(tiny_model / name) for name in ("tokenizer", "tokenizer_2")]
    assert digests[0] != digests[1]  # they pad differently

    folder = copied_tokenizer(tiny_model, tmp_path / "merges")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    lines[5], lines[6] = lines[6], lines[5]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    digests.append(tokenizer_digest(folder))

    folder = copied_tokenizer(tiny_model, tmp_path / "words")
    words = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    first, second = list(words)[:2]
    words[first], words[second] = words[second], words[first]
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    digests.append(tokenizer_digest(folder))

    folder = copied_tokenizer(tiny_model, tmp_path / "pads")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text()) | {"pad_token": {"content": "a</w>"}}
        (folder / name).write_text(json.dumps(settings))
    digests.append(tokenizer_digest(folder))
    assert len(set(digests)) == 5


def test_a_changed_merge_in_tokenizer_json_changes_it_too(tiny_model: Path, tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(tiny_model / "tokenizer").save_pretrained(tmp_path)
    assert tokenizer_digest(tmp_path) == tokenizer_digest(tiny_model / "tokenizer")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) for pair in merges]  # as older versions write them
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert tokenizer_digest(tmp_path) == tokenizer_digest(tiny_model / "tokenizer")
    content["model"]["merges"] = [merges[1], merges[0], *merges[2:]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert tokenizer_digest(tmp_path) != tokenizer_digest(tiny_model / "tokenizer")


@pytest.mark.parametrize(
    ("folder", "changed"),
    [
        ("text_encoder", {"hidden_act": "gelu"}),
        ("text_encoder_2", {"eos_token_id": 2}),
        ("text_encoder", {"num_attention_heads": 4}),
        ("text_encoder_2", {"layer_norm_eps": 1e-6}),
    ],
)
def test_a_setting_that_changes_the_embeds_changes_its_digest_alone(
    tiny_model: Path, tmp_path: Path, folder: str, changed: dict[str, object]
) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / folder / "config.json").read_text())
    (tmp_path / folder / "config.json").write_text(json.dumps(config | changed))
    before, after = read_text_facts(tiny_model).digests, read_text_facts(tmp_path).digests
    assert {name for name in before if before[name] != after[name]} == {folder}


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_missing_folder_is_named(tiny_model: Path, tmp_path: Path, missing: str) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / missing)
    with pytest.raises(DataError, match=f"no folder {missing}/"):
        read_text_facts(tmp_path)
    with pytest.raises(DataError, match=f"no folder {missing}/"):
        TextEncoders(tmp_path, "cpu")


def test_a_folder_without_some_weights_is_incomplete(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks weights of text_projection\.weight"):
        TextEncoders(tmp_path, "cpu")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"model": 3}', b'{"model": {"vocab": {}, "merges": [3]}}', b"\xff"]
)
def test_a_damaged_tokenizer_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="neither"):
        tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError):
        tokenizer_digest(tmp_path)


def test_a_tokenizer_of_another_model_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """Its ids would lie beyond the embeddings, and the first long caption would fail a build."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    vocabulary = json.loads((model / "tokenizer_2" / "vocab.json").read_text())
    (model / "tokenizer_2" / "vocab.json").write_text(json.dumps(vocabulary | {"another": len(vocabulary)}))
    with pytest.raises(DataError, match=rf"tokenizer_2 knows tokens up to {len(vocabulary)}, its text encoder"):
        read_text_facts(model)
