"""Chat templates for models that are put together here, with the markers that say what the assistant wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.image_placement import PLACEHOLDER

# The texts of a message; images before them, each on a line of its own, as the released code moves them
_CONTENT = (
    "{%- macro content(message) -%}{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- set texts = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}"
    "{%- set images = message.content | rejectattr('type', 'equalto', 'text') | list -%}"
    "{%- for image in images -%}{{ '" + PLACEHOLDER + "\n' }}{%- endfor -%}"
    "{{ texts.strip() if images else texts }}{%- endif -%}{%- endmacro -%}"
)
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
VICUNA_V1 = (
    _CONTENT + "{{ bos_token }}{%- if messages[0].role == 'system' -%}{{ content(messages[0]) + ' ' }}{%- else -%}"
    '{{ "' + _SYSTEM + " \" }}{%- endif -%}{%- for message in messages if message.role != 'system' -%}"
    "{%- if message.role == 'assistant' -%}{{ 'ASSISTANT: ' }}"
    "{% generation %}{{ content(message) }}{{ eos_token }}{% endgeneration %}"
    "{%- else -%}{{ 'USER: ' + content(message) + ' ' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
# Gemma's turns as Mini-Gemini trains them: an <eos> after each answer
GEMMA_EOS = (
    _CONTENT + "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'assistant' -%}"
    "{{ '<start_of_turn>model\n' }}{% generation %}{{ content(message) }}{{ '<end_of_turn>\n' }}{{ eos_token }}"
    "{% endgeneration %}{%- else -%}{{ '<start_of_turn>user\n' + content(message) + '<end_of_turn>\n' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# Before a language model's own template, which takes texts: what a message's parts are in one
_FLAT = (
    "{%- set flat = namespace(messages=[], text='') -%}{%- for message in messages -%}"
    "{%- if message.content is string or not message.content -%}{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}{%- set flat.text = '' -%}{%- for part in message.content -%}{%- set flat.text = flat.text + "
    "(part.text if part.type == 'text' else '" + PLACEHOLDER + "\n') -%}{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
TEMPLATES = {"vicuna_v1": VICUNA_V1, "gemma_eos": GEMMA_EOS}


def chat_template_for(tokenizer: Any, wanted: str | None = None) -> str:
    """The chat template of a new vision-language model.

    Args:
        tokenizer: of its language model.
        wanted: a name of ``TEMPLATES``; "own": the language model's, with images put into its texts; the path of a file;
            None: its own where it has one, else vicuna_v1.

    Raises:
        ValueError: no such template, or "own" where the language model has none.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if wanted is None:
        wanted = "own" if own else "vicuna_v1"
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if wanted == "own":
        if not own:
            raise ValueError(
                "template: own, but the language model has no chat template. Set one of "
                f"{', '.join(TEMPLATES)}, or a file."
            )
        return _FLAT + own
    if Path(wanted).is_file():
        return Path(wanted).read_text("utf8")
    raise ValueError(f"template: {wanted}: no such file, and none of {', '.join((*TEMPLATES, 'own'))}.")
