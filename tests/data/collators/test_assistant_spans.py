"""Nothing that is not the assistant's is ever labelled, whatever a template does to its messages."""

from pathlib import Path

import pytest
import trl

from seecal.data.collators.assistant_spans import render
from seecal.data.collators.conversation import ConversationEncoder, NoLabel
from tests.support.processors import qwen2_5_vl
from tests.support.tiny import MARKED_TEMPLATE, PLAIN_TEMPLATE

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
QUESTION = "What QQQ is it?"  # in no span


def user(text=QUESTION, role="user", **keys):
    return {"role": role, "content": [{"type": "text", "text": text}], **keys}


def answer(text, **keys):
    return {"role": "assistant", "content": [{"type": "text", "text": text}] if text else [], **keys}


def spans(template, *messages, learnt=None):
    made = render(list(messages), template, NAMES, "a", learnt)
    return [made.text[start:stop] for start, stop in made.spans]


def of_trl(name):
    return (TEMPLATES / f"{name}.jinja").read_text("utf8")


THOUGHT = "<think>\nlook\n</think>\n\nRed."


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("qwen3_5_think", THOUGHT, THOUGHT),
        ("qwen3_5_think", "look\n</think>\n\nRed.", "look\n</think>\n\nRed."),  # its opening mark is the template's
        ("qwen3_5_think", "<think>look</think>Red.", "<think>\nlook\n</think>\n\nRed."),
        ("qwen3_5_think", "  Red. ", "Red."),
        ("qwen3_5_nothink", THOUGHT, THOUGHT),
        ("deepseek_r1_distill", THOUGHT, "Red."),  # it cuts the reasoning off
        ("deepseekv3", THOUGHT, "Red."),
        ("glm4moe", THOUGHT, "<think>look</think>\nRed."),
        ("nemotron_3_nano", THOUGHT, THOUGHT),
        ("qwen2_5_vl", THOUGHT, THOUGHT),
    ],
)
def test_templates_that_take_an_answer_apart(name, text, expected):
    assert spans(of_trl(name), user(), answer(text)) == [expected]


@pytest.mark.parametrize("word", ["[seecal1.0<]", "[>seecal1.0]", "seecalx [>seecalx1.0] seecalxx"])
def test_a_text_that_contains_the_mark(word):
    """Somebody trains on this file."""
    assert spans(PLAIN_TEMPLATE, user(f"What is {word}?"), answer(f"A {word} mark.")) == [f"A {word} mark."]


def test_reasoning_of_earlier_turns_is_not_in_the_text():
    found = spans(of_trl("qwen3_5_think"), user(), answer(THOUGHT), user(), answer("<think>hm</think>Blue."))
    assert found == ["Red.", "<think>\nhm\n</think>\n\nBlue."]
    assert spans(of_trl("qwen3_5_think"), user(), answer(THOUGHT), user(), answer("Blue."), learnt=[1]) == ["Red."]


UNMARKED = [path.stem for path in sorted(TEMPLATES.glob("*.jinja")) if "endgeneration" not in path.read_text("utf8")]
CHATS = {
    "reasoning": [user(), answer(THOUGHT), user(), answer("<think>hm</think>Blue.")],
    "closing only": [user(), answer("look\n</think>\n\nRed.")],
    "the answer in the question": [
        user(f"Say Red. {QUESTION}"),
        answer("Red."),
        user(f"Red. {QUESTION}"),
        answer("Red."),
    ],
    "reasoning_content": [user(), answer("Red.", reasoning_content="look")],
    "tool call": [user(), answer("", tool_calls=CALL)],
    "tool call and its answer": [
        user(),
        answer("Wait.", tool_calls=CALL),
        user(role="tool", name="look"),
        answer("Blue."),
    ],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", UNMARKED)
def test_no_template_of_trls_lets_another_role_be_learnt(name, chat):
    """Found, or refused in one line by name; the question and the words of roles are in no span."""
    try:
        made = render(CHATS[chat], of_trl(name), NAMES, "a")
    except ValueError as error:
        assert str(error).startswith("a: ")  # noqa: PT017
        return
    for start, stop in made.spans:
        said = made.text[start:stop]
        assert "QQQ" not in said
        assert "user" not in said
        assert "assistant" not in said
    if chat in ("reasoning", "closing only", "the answer in the question"):
        assert len(made.spans) == sum(message["role"] == "assistant" for message in CHATS[chat])
        assert all("Red." in made.text[a:b] or "Blue." in made.text[a:b] for a, b in made.spans)


def of_turns(assistant):
    return (
        "{% for m in messages %}<|{{ m.role }}|>{% set text = m.content | map(attribute='text') | join %}"
        "{% if m.role == 'assistant' %}" + assistant + "{% else %}{{ text }}{% endif %}<|end|>{% endfor %}"
    )


@pytest.mark.parametrize(
    "assistant",
    [
        "{{ text[:4] }}",  # cut
        "{{ text | upper }}",  # rewritten
        "{{ text[:4] }}: {{ text }}",  # its beginning twice
        "{{ text }} {{ text }}",  # all of it twice
        "{{ text[4:] }}{{ text[:4] }}",  # moved
        "{{ text.split('is')[-1] }}",  # without its beginning, and no tag there
    ],
)
def test_what_cannot_be_found_is_refused(assistant):
    with pytest.raises(ValueError, match=r"^a: the chat template (rewrites|leaves out)"):
        spans(of_turns(assistant), user(), answer("It is red."), user(), answer("It is blue, is it?"))


def test_a_tag_that_a_template_takes_away():
    strip = of_turns("{{ text.replace('<b>', '').replace('</b>', '') }}")
    assert spans(strip, user(), answer("It is <b>red</b>.")) == ["It is red."]
    assert spans(of_turns("{{ text }}"), user(), answer("<b>It</b> is <b>red</b>.")) == ["<b>It</b> is <b>red</b>."]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'),
        ("qwen3_vl", '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'),
        ("llama3_1", '{"name": "look", "parameters": {"at": "sky"}}'),
        ("qwen3_5_think", "<tool_call>\n<function=look>\n<parameter=at>\nsky\n</parameter>\n</function>\n</tool_call>"),
    ],
)
def test_a_turn_that_is_only_a_tool_call(name, expected):
    assert spans(of_trl(name), user(), answer("", tool_calls=CALL)) == [expected]
    with_words = spans(of_trl(name), user(), answer("Wait.", tool_calls=CALL)) if name != "llama3_1" else []
    assert all(said.startswith("Wait.") and said.endswith(expected) for said in with_words)


def test_a_template_that_writes_tool_answers_inside_the_turn_is_refused():
    chat = CHATS["tool call and its answer"]
    with pytest.raises(ValueError, match=r"^a: the chat template writes other messages inside its message 1"):
        spans(of_trl("gemma4"), *chat)


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_a_turn_whose_only_content_is_not_written_is_refused(template, key):
    processor = qwen2_5_vl()
    encoder = ConversationEncoder(processor, template)
    record = {"messages": [user(), answer("", **{key: CALL if key == "tool_calls" else "look"})]}
    with pytest.raises(
        NoLabel, match=rf"a: no label: its message 1 is only {key}, which the chat template does not write"
    ):
        encoder.encode(record, "a")


def test_reasoning_is_labelled_where_the_template_writes_it():
    assert spans(of_trl("qwen3_5_think"), user(), answer("Red.", reasoning_content="look")) == [THOUGHT]
    assert spans(of_trl("qwen3_vl"), user(), answer("Red.", reasoning_content="look")) == ["Red."]
    made = render([user(), answer("Red.", reasoning_content="look")], of_trl("qwen3_vl"), NAMES, "a")
    assert made.unused == {"reasoning_content"}
    assert not render([user(), answer("Red.")], of_trl("qwen3_vl"), NAMES, "a").unused


# Reasoning in a marked block of its own, before the marked answer
IN_TWO = "{% if m.thinking %}{% generation %}{{ m.thinking }}{% endgeneration %}|{% endif %}"
IN_ONE = of_turns("{% generation %}{{ text | upper }}{% endgeneration %}")
TWO_BLOCKS = of_turns(IN_TWO + "{% generation %}{{ text }}{% endgeneration %}")
REWRITTEN = of_turns(IN_TWO + "{% generation %}{{ text | upper }}{% endgeneration %}")
BROKEN_UP = of_turns(
    "{% if '</think>' in text %}{{ text.split('</think>')[0].split('<think>')[-1] }}<|end|><|assistant|>{% endif %}"
    "{{ text.split('</think>')[-1] }}"
)
SPLIT = [user(), answer("Red."), user(), answer("<think>hm</think>Blue."), user(), answer("Sky.")]
SPOKEN = [user(), answer("Red."), user(), answer("Blue.", thinking="hm"), user(), answer("Sky.")]


@pytest.mark.parametrize(
    ("template", "chat", "learnt", "turns"),
    [
        (PLAIN_TEMPLATE, SPLIT, None, [0, 1, 2]),
        (PLAIN_TEMPLATE, SPLIT, [5], [2]),
        (PLAIN_TEMPLATE, SPLIT, [1, 5], [0, 2]),
        (PLAIN_TEMPLATE, CHATS["tool call and its answer"], [3], [1]),
        (MARKED_TEMPLATE, SPLIT, [3, 5], [1, 2]),
        (IN_ONE, [user(), answer(""), *SPLIT], None, [1, 2, 3]),  # an empty turn is no span, and counts
        (BROKEN_UP, SPLIT, None, [0, 1, 1, 2]),
        (BROKEN_UP, SPLIT, [3], [1, 1]),
        (TWO_BLOCKS, SPOKEN, None, [0, 1, 1, 2]),
        (TWO_BLOCKS, SPOKEN, [3], [1, 1]),
        (TWO_BLOCKS, SPOKEN[2:4], None, [0, 0]),
        (REWRITTEN, SPOKEN, None, [3, 4, 5, 6]),  # not to be told
    ],
)
def test_which_answer_a_span_is_of(template, chat, learnt, turns):
    made = render(chat, template, NAMES, "a", learnt)
    assert made.turns == turns
    assert len(made.spans) == len(turns)
