"""Tiny random models of the heads in transformers for images and speech, with inputs of their own kind."""

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from architectures import LAYERS, SIZES, VOCABULARY, shrunk, with_random_weights
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

HEADS = {
    "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image features": {  # of backbones without a head for classification, such as DINOv3
        model_type: name
        for model_type, name in modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES.items()
        if model_type not in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        and model_type not in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
    },
    "semantic segmentation": modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    "object detection": modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    "zero-shot image classification": modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "CTC": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "audio classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "speech to text": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "image-text to text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
BATCH, LENGTH, FRAMES = 2, 8, 64
SIDE, PATCH = 64, 8  # pixels
GRID = torch.tensor([[1, 4, 4]] * BATCH)  # patches of each image, in time, height and width

MEDIA = ("pixel_values", "flattened_patches", "input_features", "input_values")

# What makes a model of images or sound tiny, besides the sizes of text models.
MORE_SIZES: dict[int, str] = {
    2: "depth num_adapter_layers speech_encoder_layers qformer_num_hidden_layers vision_layers "
       "num_codevector_groups num_mel_layers n_layers_encoder encoder_num_hidden_layers decoder_num_hidden_layers",
    4: "speech_encoder_attention_heads encoder_num_attention_heads decoder_num_attention_heads",
    8: "patch_size num_queries num_query_tokens num_conv_pos_embeddings codevector_dim num_latents",
    16: "num_conv_pos_embedding_groups",
    32: "out_hidden_size projection_dim proj_codevector_dim output_hidden_size classifier_proj_size "
        "max_source_positions num_mel_bins feature_projection_input_dim encoder_hidden_dim decoder_hidden_size "
        "image_text_hidden_size d_latents encoder_hidden_size vision_hidden_size projector_hidden_size",
    64: "speech_encoder_intermediate_size decoder_intermediate_size unit_embed_dim",
}  # fmt: skip
# Lists with one entry for each stage: how many layers, how wide, how many heads.
DEPTHS = ("depths", "depth", "num_blocks_per_stage")
WIDTHS = ("hidden_sizes", "embed_dim", "embed_dims", "conv_dim", "neck_hidden_sizes")
HEAD_LISTS = ("num_heads", "num_attention_heads")
MEL_BINS = ("num_mel_bins", "input_feat_per_channel", "input_dim")
TRIES = ((2, 2), (4, 2), (4, 4), (2, 4))  # numbers of layers and of key and value heads
RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4}
RESNET |= {"layer_type": "basic", "out_features": ["stage4"]}
WINDOWS = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
VIT = {"out_indices": [0, 1, 2, 3], "num_hidden_layers": 4}
WHOLE_ROPE = {"text_config": {"rope_parameters": {"partial_rotary_factor": 1.0}}}
EXTRAS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"), WHOLE_ROPE),
    "mobilevit": {"initializer_range": 0.3},
    "aria": {"projector_patch_to_query_dict": {64: 8}},
    "blip-2": {"image_token_index": 150},
    "instructblip": {"image_token_index": 150},
    "kosmos-2": {"latent_query_num": 4},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "voxtral": {"audio_token_id": 150},
    "audio-spectrogram-transformer": {"max_length": FRAMES},
    "beit": VIT,
    "conditional_detr": {"backbone_config": RESNET},
    "dab-detr": {"backbone_config": RESNET},
    "data2vec-vision": VIT,
    "deformable_detr": {"backbone_config": {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}},
    "detr": {"backbone_config": RESNET},
    "donut-swin": WINDOWS,
    "gemma3": {"mm_tokens_per_image": 16},
    "cvt": {"depth": [1, 2, 3]},
    "levit": {"patch_size": 16},
    "pix2struct": {"vision_config": {"patch_embed_hidden_size": 192}},
    "qwen2_5_vl": {"vision_config": {"window_size": 32, "fullatt_block_indexes": [1]}},
    "shieldgemma2": {"mm_tokens_per_image": 16},
    "speech_to_text": {"input_feat_per_channel": 32, "max_source_positions": FRAMES},
    "swin": WINDOWS,
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 16}},
    "table-transformer": {"backbone_config": RESNET},
}


def tiny(model_type: str, class_name: str | tuple[str, ...]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small random model, the same at every call, and inputs that it takes.

    Raises:
        Exception: whatever transformers says where it cannot be made small, or takes none of the inputs tried here.
    """
    errors: list[Exception] = []
    for n_layers, kv_heads in TRIES:
        try:
            model = build(model_type, class_name if isinstance(class_name, str) else class_name[0], n_layers, kv_heads)
            return model, accepted(model)
        except Exception as error:
            errors.append(error)
    raise errors[0]


def build(model_type: str, class_name: str, n_layers: int, kv_heads: int) -> nn.Module:
    config_class, model_class = CONFIG_MAPPING[model_type], getattr(transformers, class_name)
    sizes = {name: size for group in (SIZES, MORE_SIZES) for size, names in group.items() for name in names.split()}
    sizes |= dict.fromkeys(LAYERS, n_layers) | {"num_key_value_heads": kv_heads}
    values = staged(config_class(), shrunk(config_class(), sizes))
    values = {**values, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = config_class(**merged(values, EXTRAS.get(model_type, {})))
    model = with_random_weights(model_class, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # Gemma 3's projector begins at zero, and Idefics' gates
            if not parameter.any() and "bias" not in name:
                parameter.normal_(std=0.1)
    return model


def staged(config: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the lists of a config that have one entry for each stage made small, in its parts too."""
    own = vars(config)
    for name, value in own.items():
        if not (isinstance(value, Sequence) and value and all(type(item) is int for item in value)):
            continue
        if name in DEPTHS:
            values[name] = [1] * len(value)
        elif name in WIDTHS:
            values[name] = [32 * item // min(value) // 8 * 8 for item in value]
        elif name in HEAD_LISTS:
            values[name] = [2] * len(value)
    for name in own.keys() & values.keys():
        if isinstance(own[name], Sequence) and isinstance(values[name], int):
            values[name] = [values[name]] * len(own[name]) if name == "image_size" else own[name]
    if "rope_type" in (rope := own.get("rope_parameters") or {}):  # some read the sections without naming them
        values["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2]}
    if "image_grid_pinpoints" in own:
        values["image_grid_pinpoints"] = [[SIDE, SIDE]]
    if "depths" in own:  # the other sizes follow from the stages
        for name in ("hidden_size", "num_layers", "num_hidden_layers"):
            values.pop(name, None)
    for name in config.sub_configs:
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            values[name] = staged(inner, values[name])
    return values


def merged(values: dict[str, Any], extras: dict[str, Any]) -> dict[str, Any]:
    """`values` with those of `extras` in their place, also in nested dictionaries."""
    nested = {k: merged(values[k], v) for k, v in extras.items() if isinstance(v, dict) and k in values}
    return {**values, **extras, **nested}


def accepted(model: nn.Module) -> dict[str, Tensor]:
    """The first inputs that a model takes.

    Raises:
        Exception: it takes none; the first error.
    """
    tried, first_error = list(candidates(model)), None
    for inputs in tried:
        try:
            with torch.no_grad():
                result(model, inputs)
            return inputs
        except Exception as error:
            first_error = first_error or error
            if inputs.get("input_ids", torch.zeros(1, LENGTH)).shape[1] == LENGTH:
                tried += with_tokens(model, inputs, str(error))
    raise first_error or ValueError("it has no inputs")


def candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, by the names of the forward's arguments."""
    names = set(inspect.signature(model.forward).parameters)
    text = text_inputs(names)
    if names & {"pixel_values", "flattened_patches"}:
        inputs = image_inputs(model.config, names)
    elif names & {"input_features", "input_values"}:
        inputs = sound_inputs(model.config, names)
    elif "ImageGPT" in type(model).__name__:  # its pixels are tokens
        inputs = [{}]
    else:
        raise ValueError(f"it reads {', '.join(sorted(names))}")
    for more in inputs:
        yield {**text, **more}
        yield {**text, **{name: tensor for name, tensor in more.items() if name in MEDIA}}


def text_inputs(names: set[str]) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY // 2, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if "input_ids" in names else {}
    return {**inputs, "decoder_input_ids": ids[:, :4]} if "decoder_input_ids" in names else inputs


def image_inputs(config: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """Images as pixels, as a list for each example, or as patches: of each image, or of all images in one sequence."""
    size, patch = (number(config, name, default) for name, default in (("image_size", SIDE), ("patch_size", PATCH)))
    channels = number(config, "num_channels", 0) or number(config, "in_channels", 3)
    shapes = {
        "image_sizes": torch.tensor([[size, size]] * BATCH),
        "spatial_shapes": GRID[:, 1:],
        "image_grid_thw": GRID,
        "target_sizes": GRID[:, 1:],
        "aspect_ratio_ids": torch.ones(BATCH, 1).long(),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 4).long(),
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1).long(),
        "cross_attention_mask": torch.ones(BATCH, LENGTH, 1, 4).long(),
        "image_embeds_position_mask": (torch.arange(LENGTH) < 4).expand(BATCH, -1).long(),
        "qformer_input_ids": torch.ones(BATCH, 3).long(),
    }
    more = {name: value for name, value in shapes.items() if name in names}
    n, features = int(GRID.prod(-1).sum()), channels * patch**2
    if "flattened_patches" in names:
        positions = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0)), -1).view(1, 16, 2) + 1
        yield {
            **more,
            "flattened_patches": torch.cat([positions.expand(BATCH, -1, -1), noise(BATCH, 16, features)], -1),
        }
    elif "image_grid_thw" in names:
        for frames in dict.fromkeys((number(config, "temporal_patch_size", 1), 1)):
            yield {**more, "pixel_values": noise(n, features * frames)}
    elif "spatial_shapes" in names:
        yield {
            **more,
            "pixel_values": noise(BATCH, 16, features),
            "pixel_attention_mask": torch.ones(BATCH, 16).long(),
        }
    else:
        for images in ((BATCH,), (BATCH, 1), (BATCH, 2), (BATCH, 1, 4)):
            yield {**more, "pixel_values": noise(*images, channels, size, size)}


def sound_inputs(config: Any, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """Sound as a wave, or as frames of mel bins along either axis."""
    bins = next(filter(None, (number(config, name, 0) for name in MEL_BINS)), 32)
    name = "input_features" if "input_features" in names else "input_values"
    more = {key: torch.ones(BATCH, FRAMES).long() for key in ("input_features_mask",) if key in names}
    for shape in ((BATCH, 1600), (BATCH, FRAMES, bins), (BATCH, bins, FRAMES), (BATCH, 1, 1600)):
        yield {name: noise(*shape), **more}


def with_tokens(model: Any, inputs: dict[str, Tensor], message: str) -> Iterator[dict[str, Tensor]]:
    """The inputs with as many tokens of images or sound in the text as an error of transformers asks for."""
    counts = re.search(r"tokens:? *(\d+).*?features:? *(\d+)", message, re.DOTALL)
    names = [f"{kind}_token_{end}" for kind in ("image", "audio", "image_patch") for end in ("id", "index")]
    token = next((token for name in names if (token := value(model.config, name)) is not None), None)
    if "input_ids" not in inputs or counts is None or token is None:
        return
    wanted = int(counts[2]) // BATCH
    for n in filter(None, (wanted, wanted // 32)):  # some count the numbers, not the features
        ids = torch.cat([torch.full((BATCH, n), token), inputs["input_ids"]], dim=1)
        more = {name: (ids == token).long() for name in ("mm_token_type_ids", "token_type_ids")}
        more = {name: kinds for name, kinds in more.items() if name in inspect.signature(model.forward).parameters}
        yield {**inputs, **more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def number(config: Any, name: str, otherwise: int) -> int:
    """A whole number in a config or its parts; the first of a list."""
    size = value(config, name)
    size = size[0] if isinstance(size, Sequence) else size
    return size if isinstance(size, int) else otherwise


def value(config: Any, name: str) -> Any:
    """The first value of this name in a config or its parts; None if there is none."""
    if (own := getattr(config, name, None)) is not None:
        return own
    parts = (getattr(config, part, None) for part in getattr(config, "sub_configs", ()))
    return next((v for part in parts if part is not None and (v := value(part, name)) is not None), None)


def result(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a model; where it has none, the first of its outputs."""
    output = model(**inputs)
    for name in ("logits", "logits_per_image"):
        if isinstance(output.get(name), Tensor):
            return output[name]
    return next(tensor for tensor in output.values() if isinstance(tensor, Tensor))
