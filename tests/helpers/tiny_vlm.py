"""Tiny random MoE models that read images, one for every such model type, and real images with text for them.

The vision tower has two layers of width 32 over patches of 4 x 4 pixels. The language model is that of [`tiny`]. Pixel
values come from the family's image processor; if it needs torchvision, images are cut in the same way. The text has
one placeholder per feature of the tower, as from the family's processor.
"""

import dataclasses
import inspect
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw
from tiny import FIRST_PLAIN_ID, MODEL_TYPES, OVERRIDES, SHRINK, random_model, shrunk
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


TEXT_VOCABULARY = 100  # ids from here on are special
PIXELS = 32  # of the longer side of an image

# Applied to the config of each vision tower that has the field.
SHRINK_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_heads": 4,
    "head_dim": 8,
    "patch_size": 4,
    "image_size": PIXELS,
    "max_image_size": PIXELS,
    "max_img_size": PIXELS,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "projection_intermediate_size": 32,
    "projection_hidden_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "vision_output_dim": 32,
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "num_position_embeddings": 64,
    "position_embedding_size": 64,
    "deepstack_visual_indexes": [0],
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "posemb_grid_size": 8,
    "mlp_ratio": 1.0,
    "mlp_dim": 32,
    # experts
    "moe_intermediate_size": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_layer_types": ["dense", "sparse"],
}
SHRINK_AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "text_hidden_size": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "output_dim": 32,
    "downsample_hidden_size": 8,
    "n_mel_bins": 8,
    "mel_vocab_size": 8,
}
_SAM = {"output_channels": 8, "downsample_channels": [8, 32], "window_size": 2, "global_attn_indexes": [1]}
# Differences by model type, of the part or of the whole.
PARTS: dict[str, dict] = {
    "deepseek_ocr2_sam_vision_model": _SAM,
    "dots3_note_vision_encoder": {"per_layer_config": {}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next_text": {
        "index_kpool": 2,
        "qk_rope_head_dim": 0,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}},
    "idefics3_vision": {"patch_size": 70, "image_size": 490},  # aria knows two sizes of images
    "llama4_vision_model": {"intermediate_size": 128},
    "muse_spark_audio": {"patch_sizes": [4], "hidden_sizes": [32], "depths": [1], "out_hidden_size": 32},
    "muse_spark_text": {"moe_hidden_size": 32},
    "qwen3_vl_moe_text": {"pad_token_id": 0},  # 5.0 reads it but does not declare it
    "radio": {"video_temporal_patch_size": 2, "patch_dim": 48, "video_patch_dim": 96, "num_registers": 1},
    "step3p5": {"share_expert_dim": 16, "sliding_window": 4},
    "unlimited_ocr_sam_vision_model": _SAM,
}
COMPOSITES: dict[str, dict] = {
    "aria": {"projector_patch_to_query_dict": {49: 8}},
    "diffusion_gemma": {"vision_config": "gemma4_vision"},  # `None` unless asked for
    "gemma4": {"vision_config": "gemma4_vision"},
    "internvl": {"text_config": "qwen3_moe"},  # one of those that take any language model
    "kimi_k25": {"projection_hidden_size": 32},
    "minimax_m3_vl": {"projector_hidden_size": 32},
    "muse_spark": {"projector_hidden_size": 32, "out_hidden_size": 128},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},  # its code reads it, its config does not declare it
    "nemotron_h_omni": {"projector_hidden_size": 32, "vision_hidden_size": 32},
}


def tiny_image_config(model_type: str, **overrides) -> PreTrainedConfig:
    """Returns a small config of `model_type`. `overrides` are fields of its text config."""
    cls = CONFIG_MAPPING[model_type]
    own, parts = dict(COMPOSITES.get(model_type, {})), {}
    default = cls()
    for name in cls.sub_configs:
        given = own.pop(name, None)
        part = getattr(default, name, None) if given is None else CONFIG_MAPPING[given]()
        if part is not None:
            parts[name] = _shrunk_part(type(part), name, overrides)
    special = iter(range(TEXT_VOCABULARY, SHRINK["vocab_size"]))
    ids = [name for name in inspect.signature(cls).parameters if name.endswith(("_token_id", "_token_index"))]
    given = parts if dataclasses.is_dataclass(cls) else {name: part.to_dict() for name, part in parts.items()}
    return cls(**given, **({name: next(special) for name in ids} | own))


def _shrunk_part(cls: type[PreTrainedConfig], name: str, overrides: dict) -> PreTrainedConfig:
    own = PARTS.get(cls.model_type, {})
    if name == "text_config":
        return shrunk(cls, SHRINK, OVERRIDES.get(cls.model_type, {}) | own, overrides)
    inner = {n: _shrunk_part(part, name, overrides) for n, part in cls.sub_configs.items()}
    return shrunk(cls, SHRINK_AUDIO if "audio" in name else SHRINK_VISION | inner, own)


def _reads_images_with_experts(model_type: str) -> bool:
    """True if the modelling file, or that of its language model, has routers."""
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", {})
    if "text_config" not in parts or "vision_config" not in parts:
        return False
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]
    own = inspect.getsourcefile(getattr(transformers, name if isinstance(name, str) else name[0]))
    source = Path(str(own)).read_text()
    if '"router_logits":' in source or ("topk(" in source and "Experts(" in source):
        return True
    by_choice = COMPOSITES.get(model_type, {}).get("text_config")
    return (by_choice or CONFIG_MAPPING[model_type]().text_config.model_type) in MODEL_TYPES


IMAGE_TEXT_TYPES: list[str] = sorted(filter(_reads_images_with_experts, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))


def tiny_image_model(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Returns a random model of `model_type` in eval mode. `overrides` are fields of its text config."""
    model = random_model(AutoModelForImageTextToText, tiny_image_config(model_type, **overrides), seed)
    if model_type == "llama4":
        model.language_model.register_forward_hook(_without_images)
    return model


def _without_images(module, args, output) -> None:
    """llama4 of transformers 5.24 asks its language model for `image_outputs`, which that does not return."""
    output.image_outputs = None


# ---------------------------------------------------------------------- images

# Model types without an image processor, or with one that needs torchvision, and a type with the same patches.
SEEN_AS = dict.fromkeys(
    (
        *("kimi_k25", "minimax_m3_vl", "muse_spark", "nemotron_h_omni", "qwen3_omni_moe_thinker", "qwen3_vl_moe"),
        *("qwen3_5_moe", "qwen4_exp", "dots3_note"),
    ),
    "qwen2_vl",
) | {"glm4v_moe": "glm4v"}
# Fields of their image processors.
SEEING: dict[str, dict] = {
    "aria": {"max_image_size": 490, "min_image_size": 16},
    "deepseek_ocr2": {"size": {"height": 32, "width": 32}, "tile_size": 32, "crop_to_patches": False},
    "dots3_note": {"temporal_patch_size": 1},
    "gemma4": {"max_soft_tokens": 70},
    "glm5_next": {"min_image_tokens": 1, "max_image_tokens": 16},
    "hy_v4_vl": {"size": {"shortest_edge": 64, "longest_edge": 512}},
    "internvl": {"size": {"height": PIXELS, "width": PIXELS}, "crop_to_patches": False},
    "kimi_k25": {"temporal_patch_size": 1},
    "mistral_large4": {"patch_size": 4, "size": {"longest_edge": PIXELS}},
    "nemotron_h_omni": {"temporal_patch_size": 1},
}


def draw(width: int, height: int) -> Image.Image:
    """Draws a red disc on a blue ground, with a white line across."""
    picture = Image.new("RGB", (width, height), "navy")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((width // 4, height // 4, width - 2, height - 2), fill="crimson")
    pen.line((0, height, width, 0), fill="white", width=2)
    return picture


def image_processor(model_type: str):
    """Returns the image processor of `model_type` for patches of 4 x 4 pixels, or `None` if it needs torchvision."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(SEEN_AS.get(model_type, model_type)) or {}
    if isinstance(names, tuple):  # before transformers 5.4: with PIL, or with torchvision
        names = {"pil": names[0]} if names[0] else {}
    if "pil" not in names:
        return None
    cls = getattr(transformers, names["pil"])
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}}
    known = {name for name in sizes if hasattr(cls, name) or name in inspect.signature(cls).parameters}
    return cls(**({name: sizes[name] for name in known} | SEEING.get(model_type, {})))


def tiles(picture: Image.Image, side: int) -> torch.Tensor:
    """Returns the squares of a picture, `(N, side, side, 3)` in [-1, 1]."""
    width, height = picture.size
    pixels = torch.tensor(list(picture.tobytes())).view(height, width, 3).float() / 127.5 - 1
    return pixels.unfold(0, side, side).unfold(1, side, side).permute(0, 1, 3, 4, 2).reshape(-1, side, side, 3)


def see(model_type: str, picture: Image.Image) -> dict[str, torch.Tensor]:
    """Returns the inputs that a model of `model_type` gets for a picture."""
    width, height = picture.size
    processor = image_processor(model_type)
    if model_type.startswith("inkling2"):  # squares of 2 x 2 patches, and their number
        return {"pixel_values": tiles(picture, 8), "image_grid_thw": torch.tensor([[1, height // 8, width // 8]])}
    if model_type == "inkling_mm_model":  # each patch twice, as a video of two frames
        return {"pixel_values": tiles(picture, 4).unsqueeze(1).repeat(1, 2, 1, 1, 1)}
    if processor is None:
        return {"pixel_values": tiles(picture.resize((PIXELS, PIXELS)), PIXELS).permute(0, 3, 1, 2)}
    seen = dict(processor(picture, return_tensors="pt"))
    if model_type == "kimi_k25":
        seen["pixel_values"] = seen["pixel_values"].view(-1, 3, 4, 4)
    if model_type == "nemotron_h_omni":
        seen["image_grid_hw"] = seen.pop("image_grid_thw")[:, 1:]
    return seen


def count_features(model: PreTrainedModel, seen: dict) -> int:
    """Returns the number of features that the tower of `model` makes, which is the number of placeholders."""
    reader = model if hasattr(model, "get_image_features") else model.model
    takes = inspect.signature(reader.get_image_features).parameters
    if "vision_feature_select_strategy" in takes:  # llama4, before transformers 5.14
        seen = seen | {"vision_feature_select_strategy": "default"}
    with torch.no_grad():
        output = reader.get_image_features(**{name: value for name, value in seen.items() if name in takes})
    features = getattr(output, "pooler_output", None)
    features = output.last_hidden_state if features is None else features  # llama4
    features = features if isinstance(features, (tuple, list)) else [features]
    return sum(part.numel() // part.shape[-1] for part in features)


def image_batch(model: PreTrainedModel, pictures=((24, 16), None, (16, 32)), words: int = 4, seed: int = 0) -> dict:
    """
    Returns right-padded rows: `words` tokens before and after a picture (width, height), or text alone.
    """
    generator = torch.Generator().manual_seed(seed)
    model_type, config = model.config.model_type, model.config
    image_id = next(getattr(config, n) for n in ("image_token_id", "image_token_index") if hasattr(config, n))
    takes = inspect.signature(model.forward).parameters
    seen: dict[str, list] = {}
    rows = []
    for size in pictures:
        features = 0
        if size is not None:
            given = see(model_type, draw(*size))
            features = count_features(model, given)
            for name, value in given.items():
                if name in takes:
                    seen.setdefault(name, []).append(torch.as_tensor(value))
        before, after = torch.randint(FIRST_PLAIN_ID, TEXT_VOCABULARY, (2, words), generator=generator)
        rows.append(torch.cat([before, torch.full((features,), image_id), after]))
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=SHRINK["pad_token_id"])
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    batch = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": input_ids.masked_fill((mask == 0) | (input_ids == image_id), -100),
    }
    is_image = (input_ids == image_id).long()
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        if name in takes:
            batch[name] = is_image
    return batch | {name: _joined(values) for name, values in seen.items()}


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """Stacks pictures of different sizes, padded on the right and below."""
    if values[0].ndim == 4 and values[0].shape[1] == 3:
        sides = [max(value.shape[axis] for value in values) for axis in (2, 3)]
        values = [torch.nn.functional.pad(v, (0, sides[1] - v.shape[3], 0, sides[0] - v.shape[2])) for v in values]
    return torch.cat(values)
