"""Which chat template a model gets that is put together here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.chat_templates import TEMPLATES, chat_template
from ..data.image_placement import PLACEHOLDER

# Before a language model's own template, which takes texts: what a message's parts are in one
_FLAT = (
    "{%- set flat = namespace(messages=[], text='') -%}{%- for message in messages -%}"
    "{%- if message.content is string or not message.content -%}{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}{%- set flat.text = '' -%}{%- for part in message.content -%}{%- set flat.text = flat.text + "
    "(part.text if part.type == 'text' else '" + PLACEHOLDER + "\n') -%}{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=flat.text)] -%}{%- endif -%}{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# Made for a training alone, or for one family
_NOT_OFFERED = ("plain", "paligemma")


def chat_template_for(tokenizer: Any, wanted: str | None = None) -> str:
    """The chat template of a new vision-language model.

    Args:
        tokenizer: of its language model.
        wanted: "vicuna_v1"; "gemma" (Gemma's turns as Mini-Gemini trains them, an <eos> after each answer); "own": the
            language model's, with images put into its texts; the path of a file; None: its own where it has one, else
            vicuna_v1.

    Raises:
        ValueError: no such template, or "own" where the language model has none.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if wanted is None:
        wanted = "own" if own else "vicuna_v1"
    known = [name for name in TEMPLATES if name not in _NOT_OFFERED]
    if wanted in known:
        return chat_template(wanted)
    if wanted == "own":
        if not own:
            raise ValueError(
                f"template: own, but the language model has no chat template. Set one of {', '.join(known)}, or a file."
            )
        return _FLAT + own
    if Path(wanted).is_file():
        return Path(wanted).read_text("utf8")
    raise ValueError(f"template: {wanted}: no such file, and none of {', '.join((*known, 'own'))}.")
