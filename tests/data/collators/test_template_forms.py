"""Each message is given to a chat template in the form that it takes, and a template that takes none says why itself."""

import pytest

from seecal.data.collators.template_forms import in_a_form_it_takes

PARTS = (
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
)
FOR_PARTS = "{% for m in messages %}[{{ m.role }}]" + PARTS + "{% endfor %}"
FOR_TEXTS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
# As a published one does: a user's parts are walked through, an assistant's content has to be a text
USERS_PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}"
    + PARTS
    + "{% else %}{{ m.content + '' }}{% endif %}{% endfor %}"
)
AS_IT_IS = USERS_PARTS.replace("m.content + ''", "m.content")
ROLES = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"


def message(role, *parts):
    return {
        "role": role,
        "content": [{"type": "image"} if one is None else {"type": "text", "text": one} for one in parts],
    }


def text_of(template, *messages):
    return in_a_form_it_takes(list(messages), template, {}, "a7", False)[1]


@pytest.mark.parametrize("template", [FOR_PARTS, USERS_PARTS])
def test_images_stand_where_the_parts_say(template):
    written = text_of(template, message("user", None, "What?", None), message("assistant", "It is ", "red."))
    assert written == "[user]<image>What?<image>[assistant]It is red."


@pytest.mark.parametrize("template", [FOR_TEXTS, USERS_PARTS, AS_IT_IS])
def test_texts_where_a_template_takes_texts(template):
    """A text is a list of letters to a template that walks through a user's parts, and none of them has a text."""
    assert text_of(template, message("user", "a", "b"), message("assistant", "c")) == "[user]ab[assistant]c"


@pytest.mark.parametrize("template", [FOR_PARTS, FOR_TEXTS, USERS_PARTS, AS_IT_IS])
def test_a_turn_without_words_is_written_as_nothing(template):
    """A list without parts would be "[]" where a text is expected."""
    assert text_of(template, message("user", "a"), message("assistant")) == "[user]a[assistant]"


def test_why_a_template_refuses_is_what_it_says():
    with pytest.raises(ValueError, match=r"a7: the chat template cannot render its messages: the user begins"):
        text_of(ROLES + FOR_PARTS, message("assistant", "b"))
    with pytest.raises(ValueError, match=r"a7: .* as Python does instead of its text and images"):
        text_of(FOR_TEXTS, message("user", None, "a"), message("assistant", "c"))
    both = (
        ROLES + "{% if messages[0].content is not string %}{{ raise_exception('texts only') }}{% endif %}" + FOR_TEXTS
    )
    with pytest.raises(ValueError, match=r"the user begins"):
        text_of(both, message("assistant", "b"))
