"""The spans of label tokens tile each answer as rendered, whatever the tokenizer does with blanks and bytes."""

import itertools
import json

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from seecal.data.collators.conversation import ConversationEncoder
from seecal.pages.report_data import questions_of
from seecal.scoring.spans import label_tokens
from tests.support import processors as families
from tests.support.tiny import MARKED_TEMPLATE, PLAIN_TEMPLATE, tiny_llava_processor, tiny_tokenizer

ANSWERS = {
    "plain": ["It is red."],
    "emoji": ["A 🦊 and 👨‍👩‍👧 🇩🇪!"],
    "chinese": ["这是一只红色的狐狸。"],
    "combining": ["é e\u0301 नमस्ते ก็"],
    "leading spaces": ["   It is  red"],
    "trailing blanks": ["It is red. \n  "],
    "blanks of several kinds": ["\u00a0It\tis\n\n\nred\u3000."],
    "several turns": ["It is red.", " 🦊", "红 is red "],
    "one character": ["é"],
}
_SPECIAL = ["<pad>", "<s>", "<image>", "<|start|>", "<|end|>"]
_CORPUS = ["What colour is it? It is red. It is green. user assistant a b c"] * 4


def byte_level():
    """GPT-2's kind: blanks are part of the offsets."""
    return tiny_tokenizer()


def trimmed_byte_level():
    """RoBERTa's kind: the same tokens, blanks left out of the offsets."""
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def metaspace():
    """Llama's kind: ▁ in front of words, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=[*_SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    state["model"]["byte_fallback"] = True
    return wrapped(Tokenizer.from_str(json.dumps(state)))


def wordpiece():
    """BERT's kind: blanks are in no token at all."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*_SPECIAL, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return wrapped(tokenizer)


def wrapped(tokenizer):
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|end|>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<image>", "<|start|>"]})
    return made


TOKENIZERS = {made.__name__: made for made in (byte_level, trimmed_byte_level, metaspace, wordpiece)}


def conversation(answers):
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": answer}]
    return {"id": "r", "messages": messages, "images": []}


def encoded(tokenizer, template, answers):
    processor = tiny_llava_processor()
    processor.tokenizer, processor.chat_template = tokenizer, template
    found = ConversationEncoder(processor).encode(conversation(answers), "r")
    return found, label_tokens(found)


def check_tiling(tokens, answers):
    for turn, answer in enumerate(answers):
        spans = [(token.start, token.stop) for token in tokens if token.turn == turn]
        assert spans[0][0] == 0
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
        assert spans[-1] == (len(answer), len(answer)), "the token that ends the turn"
        assert "".join(token.text for token in tokens if token.turn == turn) == answer
        assert all(token.text == answer[token.start : token.stop] for token in tokens if token.turn == turn)
    assert {token.turn for token in tokens} == set(range(len(answers)))


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "with markers"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_spans_tile_the_answer(tokenizer, template, answers):
    made = tokenizer()
    found, tokens = encoded(made, template, answers)
    assert [token.token_id for token in tokens] == [
        index for index, label in zip(found.ids.ids, found.labelled, strict=True) if label
    ]
    assert tokens[-1].token_id == made.convert_tokens_to_ids("<|end|>")
    check_tiling(tokens, answers)


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_what_a_template_trims_is_not_of_the_answer(answers):
    trimming = PLAIN_TEMPLATE.replace("{{ part.text }}", "{{ part.text | trim }}")
    _, tokens = encoded(byte_level(), trimming, answers)
    check_tiling(tokens, [answer.strip() for answer in answers])


@pytest.mark.parametrize("family", ["llava", "llava_next", "gemma3", "mllama", "qwen2_5_vl", "idefics3", "paligemma"])
def test_spans_of_the_families_templates(family):
    """Their answers: as they are, trimmed, or with a blank before the token that ends them."""
    found = ConversationEncoder(getattr(families, family)()).encode(conversation(["It is 🦊 red."]), "r")
    tokens = label_tokens(found)
    assert "".join(token.text for token in tokens) == "It is 🦊 red."
    assert tokens[-1].start == tokens[-1].stop == len("It is 🦊 red.")


def test_markers_around_the_end_of_a_turn():
    """A template whose markers enclose the token that ends the turn and a newline behind it."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content[0].text }}<|end|>\n{% endgeneration %}"
        "{% else %}{{ m.content[0].text }}<|end|>\n{% endif %}{% endfor %}"
    )
    found, tokens = encoded(byte_level(), template, ["It is red.", "a b"])
    assert [found.text[start:stop] for start, stop in found.answers] == ["It is red.", "a b"]
    check_tiling(tokens, ["It is red.", "a b"])
    assert [token.start for token in tokens if token.turn == 1][-2:] == [3, 3], "<|end|> and the newline"


def test_which_token_has_which_characters():
    _, tokens = encoded(byte_level(), PLAIN_TEMPLATE, ["It is 🦊red"])
    texts = [token.text for token in tokens]
    assert texts[:2] == ["It", " is"]
    fox = next(index for index, text in enumerate(texts) if "🦊" in text)
    assert texts[fox + 1] == "", "the other bytes of the character"
    assert texts[-2:] == ["d", ""] or texts[-2:] == ["red", ""]
    _, trimmed = encoded(trimmed_byte_level(), PLAIN_TEMPLATE, ["It is  red"])
    assert [token.text for token in trimmed] == ["It", " is", " ", " red", ""], (
        "blanks go to the token that carries them"
    )


def three_turns(**second):
    asked = [("Which?", "It is red."), ("Why?", "It is 🦊 blue."), ("When?", "a b")]
    messages = [
        message
        for question, answer in asked
        for message in (
            {"role": "user", "content": [{"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        )
    ]
    messages[3] |= second
    return {"id": "r", "messages": messages, "images": []}


@pytest.mark.parametrize(
    ("train_on", "second", "expected"),
    [
        ("all", {}, {"Which?": "It is red.", "Why?": "It is 🦊 blue.", "When?": "a b"}),
        ("all", {"loss": False}, {"Which?": "It is red.", "When?": "a b"}),
        ("last", {}, {"When?": "a b"}),
    ],
)
@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "with markers"])
def test_the_turn_is_the_number_of_the_records_answer(template, train_on, second, expected):
    """Answers that are not learnt count, so that the question of each can be found."""
    record = three_turns(**second)
    tokens = label_tokens(ConversationEncoder(tiny_llava_processor(), template, train_on).encode(record, "r"))
    said = {turn: "".join(token.text for token in tokens if token.turn == turn) for turn in {t.turn for t in tokens}}
    questions = questions_of(record["messages"], list(said))
    assert dict(zip(questions, said.values(), strict=True)) == expected


def test_the_pieces_of_an_answer_are_one_after_another():
    template = PLAIN_TEMPLATE.replace(
        "{{ part.text }}",
        "{% if '</think>' in part.text %}{{ part.text.split('</think>')[0].split('<think>')[-1] }}<|end|>\n{% endif %}"
        "{{ part.text.split('</think>')[-1] }}",
    )
    found, tokens = encoded(byte_level(), template, ["It is.", "<think>a b</think>It is 🦊 red.", "green"])
    assert [found.text[start:stop] for start, stop in found.answers] == ["It is.", "a b", "It is 🦊 red.", "green"]
    check_tiling(tokens, ["It is.", "a bIt is 🦊 red.", "green"])
    ends = [token.start for token in tokens if token.turn == 1 and token.token_id == tokens[-1].token_id]
    assert ends == [len("a b"), len("a bIt is 🦊 red.")]
