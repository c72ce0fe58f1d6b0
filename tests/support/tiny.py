"""The tiny offline model, processor and data of the recipe tiny, and a second way to write its chat template."""

from examples.tiny_vlm import CHAT_TEMPLATE as PLAIN_TEMPLATE
from examples.tiny_vlm import (
    IMAGE_TOKENS,
    tiny_dataset,
    tiny_image,
    tiny_llava,
    tiny_llava_processor,
    tiny_records,
    tiny_tokenizer,
)

__all__ = [
    "IMAGE_TOKENS",
    "MARKED_TEMPLATE",
    "PLAIN_TEMPLATE",
    "tiny_dataset",
    "tiny_image",
    "tiny_llava",
    "tiny_llava_processor",
    "tiny_records",
    "tiny_tokenizer",
]

# The same text, with blocks that say what the assistant wrote.
MARKED_TEMPLATE = PLAIN_TEMPLATE.replace(
    "{% for part in m.content %}", "{% if m.role == 'assistant' %}{% generation %}{% for part in m.content %}", 1
).replace(
    "<|end|>\n{% endfor %}",
    "<|end|>{% endgeneration %}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}<|end|>"
    "{% endif %}\n{% endfor %}",
    1,
)
