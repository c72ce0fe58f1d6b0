"""Each family's own transformers processor, sized down, around a tokenizer made in process.

The special tokens and the chat templates have the shape of the family's released ones: what opens and closes a turn, where
images go, whether the text begins with a token, and whether the last turn is closed at all (GLM-4V's is not).
"""

import functools

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from seecal.models.mgm import MGMProcessor

SIZE = {"height": 32, "width": 32}
TILES = [[32, 32], [64, 32], [64, 64]]


@functools.cache
def _trained():
    """Byte-level BPE of 300 tokens without a special one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    words = "What colour is it? It is red. It is green. It is blue.\n\n\n"  # newlines merge, as Gemma's do
    tokenizer.train_from_iterator([words] * 4, trainer)
    return tokenizer.to_str()


def tokenizer(*special, pad="<pad>", bos=None, eos="<|im_end|>", begins=False, **names):
    """With these special tokens; ``begins``: it puts ``bos`` before a text. Processors read ``names`` off it."""
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), pad_token=pad, bos_token=bos, eos_token=eos
    )
    made.add_special_tokens({"additional_special_tokens": [*special, *names.values()]})
    if begins:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, made.bos_token_id)]
        )
    for name, token in names.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


# ---------------------------------------------------------------- chat templates


def parts(image, text="{{ part.text }}"):
    """A message's parts in order."""
    either = f"{{% if part.type == 'image' %}}{image}{{% else %}}{text}{{% endif %}}"
    return f"{{% for part in m.content %}}{either}{{% endfor %}}"


def images_first(image):
    """All images of a message, then its texts."""
    shown = f"{{% for part in m.content if part.type == 'image' %}}{image}{{% endfor %}}"
    return shown + "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"


def template(*, user, assistant, system="", start="", prompt=""):
    """Each role's turn; ``start`` begins the text, ``prompt`` asks for an answer."""
    roles = (
        f"{{% if m.role == 'user' %}}{user}{{% elif m.role == 'system' %}}{system}{{% else %}}{assistant}{{% endif %}}"
    )
    asked = f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    return f"{start}{{% for m in messages %}}{roles}{{% endfor %}}{asked}"


TEXTS = "{% for part in m.content %}{{ part.text }}{% endfor %}"
TRIMMED = "{% for part in m.content %}{{ part.text | trim }}{% endfor %}"


def answer(end, words=TEXTS):
    """What the assistant writes, between two comments."""
    return f"{{# answer #}}{words}{end}{{# end #}}"


def with_markers(template):
    """The same template, in which the comments have become markers of what is learnt."""
    assert template.count("{# answer #}") == 1
    return template.replace("{# answer #}", "{% generation %}").replace("{# end #}", "{% endgeneration %}")


def chatml(image):
    turn = "<|im_start|>{{ m.role }}\n%s{{ '\\n' }}"
    user = turn % (parts(image) + "<|im_end|>")
    return template(user=user, system=user, assistant=turn % answer("<|im_end|>"), prompt="<|im_start|>assistant\n")


def vicuna():
    user = "USER: " + images_first("<image>\n") + " "
    return template(user=user, system=TEXTS + " ", assistant=f"ASSISTANT: {answer('</s>')}", prompt="ASSISTANT: ")


def mistral(image, start=""):
    user = "[INST] " + images_first(image) + " [/INST]"
    return template(start=start, user=user, system=f"[SYSTEM_PROMPT]{TEXTS}[/SYSTEM_PROMPT]", assistant=answer("</s>"))


def utterances():
    turn = "{{ m.role | capitalize }}: %s{{ '\\n' }}"
    user = turn % (parts("<image>") + "<end_of_utterance>")
    assistant = turn % answer("<end_of_utterance>")
    return template(start="<|im_start|>", user=user, system=user, assistant=assistant, prompt="Assistant:")


def gemma():
    turn = "<start_of_turn>%s\n%s{{ '\\n' }}"
    user = turn % ("user", parts("<start_of_image>", "{{ part.text | trim }}") + "<end_of_turn>")
    assistant = turn % ("model", answer("<end_of_turn>", TRIMMED))
    return template(start="{{ bos_token }}", user=user, system=user, assistant=assistant)


def glm():
    user = "<|user|>\n" + parts("<|begin_of_image|><|image|><|end_of_image|>")
    assistant = "<|assistant|>\n" + answer("", "{{ m.content }}")  # parts are for users only
    return template(start="[gMASK]<sop>", user=user, system="<|system|>\n{{ m.content }}", assistant=assistant)


def llama3():
    turn = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n%s"
    user = turn % parts("<|image|>", "{{ part.text | trim }}") + "<|eot_id|>"
    return template(start="{{ bos_token }}", user=user, system=user, assistant=turn % answer("<|eot_id|>", TRIMMED))


def prefixed():
    """For PaliGemma in several turns: not a released one."""
    user = images_first("<image>") + "{{ '\\n' }}"
    return template(user=user, system=user, assistant=answer("<eos>") + "{{ '\\n' }}")


# ---------------------------------------------------------------- processors


def llava():
    images = hf.CLIPImageProcessor(size=SIZE, crop_size=SIZE, do_center_crop=False)
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": 8}
    made = tokenizer("<image>", bos="<s>", eos="</s>", begins=True)
    return hf.LlavaProcessor(images, made, chat_template=vicuna(), **settings)


def llava_next():
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=TILES)
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": 8}
    made = tokenizer("<image>", bos="<s>", eos="</s>", begins=True)
    return hf.LlavaNextProcessor(images, made, chat_template=mistral("<image>\n"), **settings)


def llava_onevision():
    images = hf.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=TILES)
    videos, settings = hf.LlavaOnevisionVideoProcessor(size=SIZE), {"vision_feature_select_strategy": "full"}
    made = tokenizer("<|im_start|>", "<image>", "<video>")
    template = chatml("<image>\n")
    return hf.LlavaOnevisionProcessor(images, made, videos, num_image_tokens=16, chat_template=template, **settings)


QWEN = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(processor, images, videos):
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
    template = chatml("<|vision_start|><|image_pad|><|vision_end|>")
    return processor(images(**sizes), tokenizer(*QWEN), videos(**sizes), chat_template=template)


def qwen2_vl():
    return _qwen(hf.Qwen2VLProcessor, hf.Qwen2VLImageProcessor, hf.Qwen2VLVideoProcessor)


def qwen2_5_vl():
    return _qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLImageProcessor, hf.Qwen2VLVideoProcessor)


def qwen3_vl():
    return _qwen(hf.Qwen3VLProcessor, hf.Qwen2VLImageProcessor, hf.Qwen3VLVideoProcessor)


def glm4v():
    names = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>")
    marks = [f"<|{side}_of_{kind}|>" for kind in ("image", "video") for side in ("begin", "end")]
    sizes = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}}
    images, videos = hf.Glm4vImageProcessor(**sizes), hf.Glm4vVideoProcessor(**sizes)
    made = tokenizer(*names, *marks, eos="<|endoftext|>")
    return hf.Glm4vProcessor(images, made, videos, chat_template=glm())


def internvl():
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    made = tokenizer("<|im_start|>", **names, video_token="<video>")
    images = hf.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, max_patches=2)
    videos, template = hf.InternVLVideoProcessor(size=SIZE), chatml("<IMG_CONTEXT>\n")
    return hf.InternVLProcessor(images, made, videos, image_seq_length=16, chat_template=template)


def _idefics_tokenizer():
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return tokenizer(
        "<image>", "<fake_token_around_image>", "<global-img>", *tiles, bos="<|im_start|>", eos="<end_of_utterance>"
    )


_SPLIT = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def idefics3():
    images = hf.Idefics3ImageProcessor(**_SPLIT)
    return hf.Idefics3Processor(images, _idefics_tokenizer(), image_seq_len=16, chat_template=utterances())


def smolvlm():
    images, videos = hf.SmolVLMImageProcessor(**_SPLIT), hf.SmolVLMVideoProcessor(size={"longest_edge": 32})
    return hf.SmolVLMProcessor(images, _idefics_tokenizer(), videos, image_seq_len=16, chat_template=utterances())


def paligemma():
    """Released without a chat template."""
    images = hf.SiglipImageProcessor(size=SIZE)
    images.image_seq_length = 16
    return hf.PaliGemmaProcessor(images, tokenizer("<image>", bos="<bos>", eos="<eos>", begins=True))


def gemma3():
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    made = tokenizer("<start_of_turn>", bos="<bos>", eos="<end_of_turn>", begins=True, **names)
    return hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SIZE), made, image_seq_length=16, chat_template=gemma())


def mistral3():
    images = hf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size=4)
    names = ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    made = tokenizer(*names, bos="<s>", eos="</s>", begins=True)
    template = mistral("[IMG]", start="{{ bos_token }}")
    return hf.PixtralProcessor(images, made, patch_size=4, spatial_merge_size=2, chat_template=template)


def ovis2():
    """``<image>`` is no token of its own: the processor finds it in the text."""
    made = tokenizer(*(f"<IMG_{name}>" for name in ("ATOM", "START", "GRID", "COL", "ROW", "END")), "<|im_start|>")
    images = hf.Ovis2ImageProcessor(size=SIZE, crop_to_patches=True, max_patches=3)
    return hf.Ovis2Processor(images, made, image_seq_length=16, chat_template=chatml("<image>\n"))


def mllama():
    """``<|image|>`` is the first id beyond the text vocabulary."""
    names = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    made = tokenizer(*names, bos="<|begin_of_text|>", eos="<|eot_id|>", begins=True, image_token="<|image|>")
    assert made.image_token_id == len(made) - 1
    return hf.MllamaProcessor(hf.MllamaImageProcessor(size=SIZE, max_image_tiles=2), made, chat_template=llama3())


def mgm(grid=1):
    """``grid=2``: as MGM-HD, with the whole picture."""
    side = 32 * grid * 2
    images = hf.LlavaImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True
    )
    made = tokenizer("<image>", bos="<s>", eos="</s>", begins=True)
    tiles = {"image_grid": grid, "image_global": grid > 1}
    return MGMProcessor(images, made, image_size=32, patch_size=8, chat_template=vicuna(), **tiles)
