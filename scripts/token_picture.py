"""Draw an answer with every token shaded by its CAL weight, its Δ (logits) below:

    python scripts/token_picture.py MODEL IMAGE QUESTION ANSWER OUT.svg

docs/tokens.svg is what the model of `seecal demo --steps 165` (seed 0) gives for the description that the demo's own table
shows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from seecal import token_weights, visual_delta
from seecal.data.collators.vision import VisionCollator
from seecal.models.loading import load_vlm

CHARACTER, LINE, WIDTH, MARGIN = 9.65, 52, 720, 16
HIGHEST = 5.0  # β: this weight is full colour, α is none
FONT = "16px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
STYLE = f"text{{font:{FONT};fill:#1f2328}}.s{{font-size:11px;fill:#656d76}}"


def scored(model: str, image: str, question: str, answer: str) -> list[tuple[str, float, float]]:
    """(token, Δ, weight) of every label token of the answer."""
    network, processor = load_vlm(model)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    batch = VisionCollator(processor)([{"id": image, "messages": messages, "images": [image]}])
    delta = visual_delta(network, batch)
    weights = token_weights(delta.delta, delta.runs)
    tokens = [processor.tokenizer.decode([label]) for label in delta.labels.tolist()]
    return list(zip(tokens, delta.delta.tolist(), weights.tolist(), strict=True))


def drawn(tokens: list[tuple[str, float, float]]) -> str:
    """The picture as SVG."""
    parts, x, y = [], float(MARGIN), MARGIN
    for token, delta, weight in tokens:
        lead, word = len(token) - len(token.lstrip()), token.strip()
        width = len(word) * CHARACTER
        if x + lead * CHARACTER + width > WIDTH - MARGIN:
            x, y, lead = float(MARGIN), y + LINE, 0
        x += lead * CHARACTER
        shade = max(0.0, (weight - 1) / (HIGHEST - 1)) ** 0.5  # the eye sees small differences of light colours better
        parts.append(
            f'<rect x="{x - 2:.1f}" y="{y}" width="{width + 4:.1f}" height="25" rx="4" fill="#2da44e" '
            f'fill-opacity="{shade:.2f}"/><text x="{x:.1f}" y="{y + 18}">{escape(word)}</text>'
        )
        if len(word) > 1:  # a point has no room for a figure below it
            parts.append(f'<text x="{x:.1f}" y="{y + 39}" class="s">{delta:+.1f}</text>')
        x += width
    height = y + LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="A caption, each token shaded by its CAL weight, Δ in logits below it">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" rx="8" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    *inputs, out = sys.argv[1:]
    Path(out).write_text(drawn(scored(*inputs)), "utf8")
